# make demo   the main job, on a fresh machine, in under five minutes
# make test   everything that can run on this machine
#
# TORCH_INDEX_URL   extra package index with CPU builds of torch (see README.md)
# PYTHON            interpreter that makes the environment, 3.11 or newer
# FUZZ_SECONDS      how long make fuzz goes on

PYTHON ?= python3
FUZZ_SECONDS ?= 300
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := .venv-vllm
SGLANG := .venv-sglang
OLD_SGLANG := .venv-sglang-0.5.9
PIP_INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))
CHECKED := eagle_target transports adapters tests benchmarks examples docs

ifdef TORCH_INDEX_URL
export UV_EXTRA_INDEX_URL := $(TORCH_INDEX_URL)
export UV_INDEX_STRATEGY := unsafe-best-match
endif

.PHONY: help env demo test test-core test-cuda-sim test-cuda-sim-mutants test-vllm test-sglang test-engines lint docs \
	bench-wire bench-projection bench-transports bench-vllm bench-vllm-layouts bench-sglang bench-server \
	bench-fingerprint batch-path sweep-architectures soak fuzz faults clean

help:
	@sed -n 's/^# //p' Makefile
	@echo "targets: env demo test test-core test-cuda-sim test-cuda-sim-mutants test-vllm test-sglang test-engines lint docs"
	@echo "         bench-wire bench-projection bench-transports bench-vllm bench-vllm-layouts bench-sglang bench-server"
	@echo "         bench-fingerprint batch-path sweep-architectures soak fuzz faults clean"

env: $(READY)

$(READY): pyproject.toml $(wildcard adapters/*/pyproject.toml) constraints.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_INDEX) -c constraints.txt -r requirements-dev.txt \
		-e ".[vocab,testing]" -e "adapters/hf[device-map]" -e adapters/sglang -e adapters/vllm
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 --ignore tests/cuda_sim
	$(MAKE) test-cuda-sim
	$(MAKE) -j 2 --output-sync=target test-vllm test-sglang
	$(MAKE) test-engines

test-core: $(READY)
	$(BIN)/python -m pytest tests/contract tests/compute tests/protocol tests/plugins tests/memory tests/backend tests/vocab \
		tests/checkpoints tests/test_config.py

# What a class loads once stays on one worker.
test-cuda-sim: $(READY)
	$(BIN)/python -m pytest tests/cuda_sim -n 2 --dist loadscope --cuda-sim-seeds 20

test-cuda-sim-mutants: $(READY)
	$(BIN)/python -m tests.cuda_sim.mutants

$(VLLM)/.ready: $(READY) $(wildcard adapters/vllm/environment/*)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh adapters/vllm/environment/make.sh $(VLLM)

$(SGLANG)/.ready: $(READY) $(wildcard adapters/sglang/tests/environment/*.*)
	$(BIN)/python adapters/sglang/tests/environment/make.py 0.5.23 $(SGLANG)
	touch $@

$(OLD_SGLANG)/.ready: $(READY) $(wildcard adapters/sglang/tests/environment/*.*)
	$(BIN)/python adapters/sglang/tests/environment/make.py 0.5.9 $(OLD_SGLANG)
	touch $@

test-vllm: $(VLLM)/.ready
	VLLM_LOGGING_LEVEL=ERROR $(VLLM)/bin/python -m pytest -c adapters/vllm/environment/pytest.ini --rootdir . \
		adapters/vllm/tests

test-sglang: $(SGLANG)/.ready $(OLD_SGLANG)/.ready
	$(SGLANG)/bin/python -m pytest adapters/sglang/tests -m "not gpu"
	$(OLD_SGLANG)/bin/python -m pytest adapters/sglang/tests -m "engine_sglang and not gpu"

test-engines: $(READY) $(VLLM)/.ready $(SGLANG)/.ready
	$(BIN)/python -m pytest tests/engines -m "engine_vllm and engine_sglang"

lint: $(READY)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/lint-imports
	$(BIN)/mypy
	for adapter in hf sglang vllm; do \
		(cd adapters/$$adapter && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml tests) || exit 1; done
	$(BIN)/python docs/build_reference.py --check

docs: $(READY)
	$(BIN)/python docs/build_reference.py

bench-wire: $(READY)
	$(BIN)/python benchmarks/wire.py

bench-projection: $(READY)
	$(BIN)/python benchmarks/projection.py

bench-transports: $(READY)
	$(BIN)/python -m benchmarks.transports

bench-vllm: $(VLLM)/.ready
	$(BIN)/python -m benchmarks.vllm_prefill

bench-vllm-layouts: $(VLLM)/.ready
	$(BIN)/python -m benchmarks.vllm_layouts

bench-sglang: $(SGLANG)/.ready
	$(BIN)/python -m benchmarks.sglang_extend

bench-server: $(READY)
	$(BIN)/python -m benchmarks.server

bench-fingerprint: $(READY)
	$(BIN)/python -m benchmarks.fingerprint

batch-path: $(READY)
	$(BIN)/python -m benchmarks.batch_path

sweep-architectures: $(READY)
	$(BIN)/python -m benchmarks.sweep_architectures --write

soak: $(READY)
	$(BIN)/python -m benchmarks.soak

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

faults: $(READY)
	$(BIN)/python -m benchmarks.faults --write

clean:
	rm -rf $(VENV) $(VLLM) $(SGLANG) $(OLD_SGLANG) .bench .demo .mypy_cache .ruff_cache .pytest_cache
