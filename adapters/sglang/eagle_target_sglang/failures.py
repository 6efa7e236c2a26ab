"""One place where whatever the engine raises becomes an AdapterError."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from eagle_target.errors import AdapterError, EagleTargetError
from eagle_target_sglang.versions import engine_versions

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def engine_call(what: str, device: torch.device) -> Iterator[None]:
    """Run the engine without gradients and without the caller's autocast.

    Raises:
        AdapterError: the engine failed, with its message and versions kept; out of memory names what to lower.
    """
    try:
        # A trainer's autocast would make co-located supervision differ from a server's.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    except EagleTargetError:
        raise
    except Exception as error:
        message = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in message or "not enough memory" in message:
            raise AdapterError(
                f"out of memory in {what} on {device}: lower max_total_tokens, which sizes the KV pool and a forward, "
                f"or mem_fraction_static ({error})"
            ) from error
        raise AdapterError(f"{engine_versions()} failed in {what}: {type(error).__name__}: {error}") from error
