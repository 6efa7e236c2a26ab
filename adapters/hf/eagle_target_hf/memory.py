"""How many tokens a forward may have, by what earlier ones took of the device's memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# The allocator cannot use all that is free: it is in pieces.
USABLE_SHARE = 0.9


class ForwardMemory:
    """Measures forwards on CUDA; tells nothing elsewhere, and nothing before the first one.

    Args:
        device: where forwards run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes_per_token = 0.0
        self._is_asked = False

    def token_capacity(self) -> int | None:
        """Tokens that fit what is free now, at the most that a token has taken; see `CapacityRunner`."""
        # A process that never asks keeps its own peak statistics.
        self._is_asked = self._device.type == "cuda"
        if not self._is_asked or not self._bytes_per_token:
            return None
        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return max(1, int(USABLE_SHARE * (free + unused) / self._bytes_per_token))

    @contextmanager
    def measuring(self, tokens: int) -> Iterator[None]:
        """Measure a forward of so many tokens inside."""
        if not self._is_asked or not tokens:
            yield
            return
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        taken = torch.cuda.max_memory_allocated(self._device) - before
        self._bytes_per_token = max(self._bytes_per_token, taken / tokens)
