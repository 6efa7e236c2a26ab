"""What vLLM is called in messages, which options make it fit, and what says that its processes are gone."""

from __future__ import annotations

from functools import partial

import vllm

from eagle_target.plugins import engine_errors

FORWARD_REMEDY = (
    "lower -o max_num_batched_tokens, -o max_model_len or -o gpu_memory_utilization, or raise -o tensor_parallel_size"
)
CACHE_REMEDY = "lower -o max_model_len, or raise -o kv_cache_memory_bytes (CPU) or -o gpu_memory_utilization (GPU)"


def _memory_remedy(message: str) -> str:
    return CACHE_REMEDY if "cache" in message.lower() else FORWARD_REMEDY


engine_call = partial(
    engine_errors.engine_call,
    engine=f"vLLM {vllm.__version__}",
    memory_remedy=_memory_remedy,
    memory_words=("kv cache", "available memory"),
    death_names=("EngineDeadError", "EngineGenerateError", "BrokenPipeError"),
    exits=True,
)
