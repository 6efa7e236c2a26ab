# make demo   the main job, on a fresh machine, in under five minutes
# make test   everything that can run on this machine
#
# TORCH_INDEX_URL   extra package index with CPU builds of torch (see README.md)
# PYTHON            interpreter that makes the environment, 3.11 or newer

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP_INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))
CHECKED := eagle_target transports adapters/hf tests benchmarks examples docs

.PHONY: help env demo test test-core lint docs bench-wire bench-projection clean

help:
	@sed -n 's/^# //p' Makefile
	@echo "targets: env demo test test-core lint docs bench-wire bench-projection clean"

env: $(READY)

$(READY): pyproject.toml adapters/hf/pyproject.toml constraints.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_INDEX) -c constraints.txt -r requirements-dev.txt \
		-e ".[vocab,testing]" -e "adapters/hf[device-map]"
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

test-core: $(READY)
	$(BIN)/python -m pytest tests/core tests/vocab tests/test_tensor_format.py tests/test_config.py tests/test_plugins.py

lint: $(READY)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy
	cd adapters/hf && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml tests
	$(BIN)/python docs/build_reference.py --check

docs: $(READY)
	$(BIN)/python docs/build_reference.py

bench-wire: $(READY)
	$(BIN)/python benchmarks/wire.py

bench-projection: $(READY)
	$(BIN)/python benchmarks/projection.py

clean:
	rm -rf $(VENV) .bench .demo .mypy_cache .ruff_cache .pytest_cache
