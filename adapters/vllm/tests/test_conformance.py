"""The vllm adapter passes the suites that every adapter passes, on the real engine, in this process and served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from eagle_target_vllm import VLLMAdapter

from eagle_target.checkpoints.digest import checkpoint_digest
from eagle_target.testing.adapter_checkpoints import WholeCheckpointConformance
from eagle_target.testing.adapter_served import ServedAdapterConformance
from eagle_target.testing.adapter_suite import AdapterSuite
from eagle_target.testing.adapters import AdapterConformance, BFloat16Adapter

if TYPE_CHECKING:
    from pathlib import Path

    from eagle_target.testing.adapter_suite import LoadedTarget


class OnVLLM(AdapterSuite):
    """What vLLM wants of a target, and how little memory it may take."""

    adapter = VLLMAdapter
    options: ClassVar[dict[str, Any]] = {"kv_cache_memory_bytes": 64 << 20}

    @classmethod
    def make_checkpoint(cls, folder: Path, **sizes: Any) -> Path:
        # vLLM's attention on a CPU has no heads of 16.
        return super().make_checkpoint(folder, **{"heads": 2, "kv_heads": 1, **sizes})


class TestVLLMAdapter(OnVLLM, AdapterConformance, BFloat16Adapter, WholeCheckpointConformance):
    """Eager, for the suite changes layers; compiled it is served, below."""

    options: ClassVar[dict[str, Any]] = {**OnVLLM.options, "enforce_eager": True}

    def test_the_checkpoint_s_weights_are_known(self, target: LoadedTarget) -> None:
        assert target.runner.info.weights == checkpoint_digest(str(target.checkpoint)) is not None


class TestVLLMAdapterServed(OnVLLM, ServedAdapterConformance):
    """Layers are fixed at load as in any compiled model, but inductor's minutes are left to test_parity."""

    serve_environment: ClassVar[dict[str, str]] = {"VLLM_CPU_CI_ENV": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
