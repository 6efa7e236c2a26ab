"""One place where whatever an engine raises becomes an AdapterError."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from eagle_target.errors import AdapterError, EagleTargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


@contextmanager
def engine_call(
    what: str,
    *,
    engine: Callable[[], str],
    memory_remedy: Callable[[str], str],
    device: torch.device | None = None,
    memory_words: Sequence[str] = (),
) -> Iterator[None]:
    """Run an engine without gradients and, where its device is given, without the caller's autocast.

    Args:
        what: what it does, for messages.
        engine: its name and version.
        memory_remedy: from the engine's message to the options that make it fit.
        device: where it runs in this process.
        memory_words: further lower-case words of messages that speak of memory.

    Raises:
        AdapterError: the engine failed, with its message kept; out of memory names the options to change.
    """
    # A trainer's autocast would make co-located supervision differ from a server's.
    autocast = nullcontext() if device is None else torch.autocast(device.type, enabled=False)
    try:
        with torch.no_grad(), autocast:
            yield
    except EagleTargetError:
        raise
    except Exception as error:
        message = str(error)
        if _is_out_of_memory(error, (*MEMORY_WORDS, *memory_words)):
            where = "" if device is None else f" on {device}"
            raise AdapterError(f"out of memory in {what}{where}: {memory_remedy(message)} ({message})") from error
        raise AdapterError(f"{engine()} failed in {what}: {type(error).__name__}: {message}") from error


def _is_out_of_memory(error: Exception, words: Sequence[str]) -> bool:
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in message for word in words)
