"""What vLLM is called in messages, which options make it fit, and when its processes are gone."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from eagle_target.errors import AdapterError, EngineDead
from eagle_target.plugins import engine_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

FORWARD_REMEDY = (
    "lower -o max_num_batched_tokens, -o max_model_len or -o gpu_memory_utilization, or raise -o tensor_parallel_size"
)
CACHE_REMEDY = "lower -o max_model_len, or raise -o kv_cache_memory_bytes (CPU) or -o gpu_memory_utilization (GPU)"
_DEATH_NAMES = ("EngineDeadError", "EngineGenerateError", "BrokenPipeError")
_MEMORY_WORDS = ("kv cache", "available memory")


@contextmanager
def engine_call(what: str, version: str) -> Iterator[None]:
    """Run the engine; see `engine_errors.engine_call`.

    Raises:
        AdapterError: the engine failed, with its message kept; out of memory names the options to change.
        EngineDead: its processes are gone.
    """
    with engine_errors.engine_call(
        what, engine=lambda: f"vLLM {version}", memory_remedy=_memory_remedy, memory_words=_MEMORY_WORDS
    ):
        try:
            yield
        except SystemExit as error:
            raise AdapterError(f"vLLM {version} ended in {what}: its log says why") from error
        except Exception as error:
            if is_dead(error):
                raise EngineDead(
                    f"vLLM {version} died in {what}: its log says why ({type(error).__name__}). Restart the server; "
                    f"if it ran out of memory, {FORWARD_REMEDY}"
                ) from error
            raise


def is_dead(error: BaseException) -> bool:
    """Whether the engine's processes are gone, so that no later call can succeed."""
    return type(error).__name__ in _DEATH_NAMES


def _memory_remedy(message: str) -> str:
    return CACHE_REMEDY if "cache" in message.lower() else FORWARD_REMEDY
