"""What SGLang is called in messages, and which options make a forward fit."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from eagle_target.plugins import engine_errors
from eagle_target_sglang.versions import engine_versions

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

MEMORY_REMEDY = "lower max_total_tokens, which sizes the KV pool and a forward, or mem_fraction_static"


@contextmanager
def engine_call(what: str, device: torch.device) -> Iterator[None]:
    """Run the engine; see `engine_errors.engine_call`.

    Raises:
        AdapterError: the engine failed, with its message and versions kept; out of memory names what to lower.
    """
    with engine_errors.engine_call(
        what, engine=engine_versions, memory_remedy=lambda _message: MEMORY_REMEDY, device=device
    ):
        yield
