"""The vllm adapter passes the suite that every adapter passes, on the real engine in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from eagle_target_vllm import VLLMAdapter

from eagle_target.testing.adapters import AdapterConformance, BFloat16Adapter

if TYPE_CHECKING:
    from pathlib import Path


class TestVLLMAdapter(AdapterConformance, BFloat16Adapter):
    adapter = VLLMAdapter
    options: ClassVar[dict[str, Any]] = {"kv_cache_memory_bytes": 64 << 20}
    # 8.4e-2 was seen on this target, whose weights are large; test_parity holds bfloat16 to transformers' own error.
    bfloat16_tolerance: ClassVar[float] = 0.15

    @classmethod
    def make_checkpoint(cls, folder: Path, **sizes: Any) -> Path:
        # vLLM's attention on a CPU has no heads of 16.
        return super().make_checkpoint(folder, **{"heads": 2, "kv_heads": 1, **sizes})
