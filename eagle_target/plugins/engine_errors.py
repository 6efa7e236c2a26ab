"""One place where whatever an engine raises becomes an AdapterError."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from eagle_target.errors import AdapterError, EagleTargetError, EngineDead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


@contextmanager
def engine_call(
    what: str,
    *,
    engine: str,
    memory_remedy: str | Callable[[str], str],
    device: torch.device | None = None,
    memory_words: Sequence[str] = (),
    death_names: Sequence[str] = (),
    exits: bool = False,
) -> Iterator[None]:
    """Run an engine without gradients and, where its device is given, without the caller's autocast.

    Args:
        what: what it does, for messages.
        engine: its name and version.
        memory_remedy: the options that make it fit; a function where they depend on the engine's message.
        device: where it runs in this process.
        memory_words: further lower-case words of messages that speak of memory.
        death_names: exception classes that say that the engine's processes are gone, by name, for an engine is not
            imported to tell its errors.
        exits: whether it ends the process where others raise; that is an error, too, then.

    Raises:
        AdapterError: the engine failed, with its message kept; out of memory names the options to change.
        EngineDead: its processes are gone, so that no later call can succeed.
    """
    # A trainer's autocast would make co-located supervision differ from a server's.
    autocast = nullcontext() if device is None else torch.autocast(device.type, enabled=False)
    try:
        with torch.no_grad(), autocast:
            yield
    except EagleTargetError:
        raise
    except SystemExit as error:
        if not exits:
            raise
        raise AdapterError(f"{engine} ended in {what}: its log says why") from error
    except Exception as error:
        message = str(error)
        if type(error).__name__ in death_names:
            # What killed it is in its log, not in this message.
            raise EngineDead(
                f"{engine} died in {what}: its log says why ({type(error).__name__}). Restart the server; "
                f"if it ran out of memory, {_remedy(memory_remedy, '')}"
            ) from error
        if _is_out_of_memory(error, (*MEMORY_WORDS, *memory_words)):
            where = "" if device is None else f" on {device}"
            raise AdapterError(
                f"out of memory in {what}{where}: {_remedy(memory_remedy, message)} ({message})"
            ) from error
        raise AdapterError(f"{engine} failed in {what}: {type(error).__name__}: {message}") from error


def _is_out_of_memory(error: Exception, words: Sequence[str]) -> bool:
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in message for word in words)


def _remedy(remedy: str | Callable[[str], str], message: str) -> str:
    return remedy if isinstance(remedy, str) else remedy(message)
