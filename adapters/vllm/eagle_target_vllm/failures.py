"""One place where whatever vLLM raises becomes an AdapterError."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from eagle_target.errors import AdapterError, EagleTargetError

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMORY_HINT = (
    "lower -o max_num_batched_tokens, -o max_model_len or -o gpu_memory_utilization, or raise -o tensor_parallel_size"
)
_DEATH_NAMES = ("EngineDeadError", "EngineGenerateError", "BrokenPipeError")
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "kv cache", "available memory")


@contextmanager
def engine_call(what: str, version: str) -> Iterator[None]:
    """Run the engine without gradients.

    Raises:
        AdapterError: the engine failed, with its message kept; out of memory names the options to change.
    """
    try:
        with torch.no_grad():
            yield
    except EagleTargetError:
        raise
    except Exception as error:
        raise AdapterError(describe_failure(error, what, version)) from error
    except SystemExit as error:
        raise AdapterError(f"vLLM {version} ended in {what}: its log says why") from error


def describe_failure(error: BaseException, what: str, version: str) -> str:
    """Say what failed, with the engine's message, and what to change where that is known."""
    message = str(error)
    if is_dead(error):
        return (
            f"vLLM {version} died in {what}: its log says why ({type(error).__name__}). Restart the server; "
            f"if it ran out of memory, {MEMORY_HINT}"
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _speaks_of_memory(message):
        return f"vLLM {version} has not enough memory in {what}: {message}. To fit, {_memory_hint(message)}"
    return f"vLLM {version} failed in {what}: {type(error).__name__}: {message}"


def is_dead(error: BaseException) -> bool:
    """Whether the engine's processes are gone, so that no later call can succeed."""
    return type(error).__name__ in _DEATH_NAMES


def _speaks_of_memory(message: str) -> bool:
    return any(word in message.lower() for word in _MEMORY_WORDS)


def _memory_hint(message: str) -> str:
    if "cache" in message.lower():
        return "lower -o max_model_len, or raise -o kv_cache_memory_bytes (CPU) or -o gpu_memory_utilization (GPU)"
    return MEMORY_HINT
