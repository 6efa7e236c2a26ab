"""The real engine on CUDA: in this process, in its own, over two devices, by either capture."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from eagle_target_sglang import SGLangAdapter, SGLangOptions
from eagle_target_sglang.generations import has_official_capture

from eagle_target.testing.adapter_contract import AdapterContractConformance
from eagle_target.testing.adapter_oracle import HFOracle
from eagle_target.testing.adapter_served import ServedAdapterConformance
from eagle_target.testing.adapters import AdapterConformance, AdapterParityConformance, BFloat16Adapter

from .checkpoints import save_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from eagle_target.contract.runner import TargetForward, TargetRunner

pytestmark = [pytest.mark.gpu, pytest.mark.engine_sglang, pytest.mark.filterwarnings("default")]

AUX = (1, 3, 4)
LENGTHS = (30, 1, 7, 200)
# Kernels of SGLang's that take heads of 16 and float32, which the suite's targets have.
SMALL_HEADS = {"device": "cuda", "attention_backend": "triton"}


@pytest.fixture(autouse=True, scope="module")
def enough_devices() -> None:
    assert torch.cuda.is_available(), "needs a CUDA device, has none"


class TestOnCuda(AdapterConformance, BFloat16Adapter):
    """One rank in a process of its own: results come back through pinned buffers."""

    adapter = SGLangAdapter
    options: ClassVar[dict[str, Any]] = {"in_process": False, **SMALL_HEADS}
    # float32 products of tensor cores may keep 10 bits of the fraction.
    tolerance: ClassVar[float] = 2e-3


class TestServedOnCuda(ServedAdapterConformance):
    """The engine in the server's process, tensors on its device until they are sent."""

    adapter = SGLangAdapter
    options: ClassVar[dict[str, Any]] = SMALL_HEADS
    tolerance: ClassVar[float] = 2e-3


class TestInProcessOnCuda(AdapterParityConformance, AdapterContractConformance):
    """The engine in this process: tensors stay on the device."""

    adapter = SGLangAdapter
    tolerance: ClassVar[float] = 2e-3
    _has_one: ClassVar[bool] = False

    @classmethod
    def load(cls, checkpoint: Path, **more_options: Any) -> TargetRunner:
        first, TestInProcessOnCuda._has_one = not cls._has_one, True
        return super().load(checkpoint, **{"in_process": first, **SMALL_HEADS, **more_options})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", "bfloat16")


@pytest.mark.parametrize(
    "options",
    [{}, {"tp_size": 2}, {"base_gpu_id": 1}, {"capture": "official"}, {"attention_backend": "triton"}],
    ids=str,
)
def test_bfloat16_is_near_transformers(checkpoint: Path, options: dict[str, Any]) -> None:
    devices = options.get("tp_size", 1) + options.get("base_gpu_id", 0)
    assert torch.cuda.device_count() >= devices, f"needs {devices} CUDA devices, has {torch.cuda.device_count()}"
    if options.get("capture") == "official" and not has_official_capture():
        pytest.skip("this SGLang has no official capture")
    runner = SGLangAdapter.load(str(checkpoint), SGLangOptions(in_process=False, device="cuda", **options))
    oracle = HFOracle(checkpoint)
    oracle.model.float()
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, oracle.vocab_size, (length,), generator=draw).tolist() for length in LENGTHS]
    given: list[TargetForward] = []

    def run() -> None:
        runner.set_aux_layers(AUX)
        given.append(runner.forward_eagle3(torch.tensor([token for row in rows for token in row]), LENGTHS))

    try:
        # A thread has a current device of its own, which is not the engine's.
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(120.0)
        states = [oracle.run(row) for row in rows]
        logits = runner.compute_logits(given[0].last_hidden_states)
        for made, wanted in (
            (given[0].aux_hidden_states, torch.cat([state.aux(AUX) for state in states])),
            (given[0].last_hidden_states, torch.cat([state.last for state in states])),
            (logits, torch.cat([state.logits for state in states])),
        ):
            assert float((made.cpu().float() - wanted).norm() / wanted.norm()) <= 5e-2
    finally:
        runner.close()
