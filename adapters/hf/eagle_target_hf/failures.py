"""What transformers is called in messages, and which option makes a forward fit."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from eagle_target.plugins import engine_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


@contextmanager
def engine_call(what: str, device: torch.device, max_batch_tokens: int) -> Iterator[None]:
    """Run the engine; see `engine_errors.engine_call`.

    Raises:
        AdapterError: the engine failed, with its message kept; out of memory names the option to lower.
    """
    with engine_errors.engine_call(
        what,
        engine=lambda: "transformers",
        memory_remedy=lambda _message: f"lower max_batch_tokens, now {max_batch_tokens}",
        device=device,
    ):
        yield
