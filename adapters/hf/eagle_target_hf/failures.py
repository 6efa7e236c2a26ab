"""One place where whatever the engine raises becomes an AdapterError."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from eagle_target.errors import AdapterError, EagleTargetError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def engine_call(what: str, device: torch.device, max_batch_tokens: int) -> Iterator[None]:
    """Run the engine without gradients and without the caller's autocast.

    Raises:
        AdapterError: the engine failed, with its message kept; out of memory names the option to lower.
    """
    try:
        # A trainer's autocast would make co-located supervision differ from a server's.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    except EagleTargetError:
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise AdapterError(
                f"out of memory in {what} on {device}: lower max_batch_tokens, now {max_batch_tokens} ({error})"
            ) from error
        raise AdapterError(f"transformers failed in {what}: {type(error).__name__}: {error}") from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in message or "can't allocate memory" in message)
