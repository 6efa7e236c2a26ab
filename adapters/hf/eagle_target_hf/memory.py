"""How many tokens a forward may have, by what earlier ones took of the device's memory."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# The allocator cannot use all that is free: it is in pieces.
USABLE_SHARE = 0.9
# Fewer say nothing of a token: what a forward takes whatever its size is more than they take.
SIZEABLE_TOKENS = 1024
# So few take nothing beside that.
FIXED_TOKENS = 64
# Old forwards are forgotten, so that one that was unlike the others does not decide for ever.
KEPT_FORWARDS = 32


class _Taken(NamedTuple):
    """What a forward took. tokens: it had. nbytes: at its peak, over what was taken before."""

    tokens: int
    nbytes: int


class ForwardMemory:
    """Measures forwards on CUDA; tells nothing elsewhere, and nothing before the first sizeable one.

    What a forward takes is a fixed part, such as the workspaces of kernels or weights that are dequantised, and a part
    for each token. The first is seen in forwards of a few tokens, the second in sizeable ones.

    CUDA's peak is the process's, so a head that runs beside a forward is in it. Such a forward counts only while no
    sizeable one was alone.

    Args:
        device: where forwards run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_asked = False
        self._is_alone = True
        self._alone: deque[_Taken] = deque(maxlen=KEPT_FORWARDS)
        self._accompanied: deque[_Taken] = deque(maxlen=KEPT_FORWARDS)
        self._tiny: deque[int] = deque(maxlen=KEPT_FORWARDS)

    def token_capacity(self) -> int | None:
        """Tokens that fit what is free now, at the most that a token took in the latest forwards.

        See `CapacityRunner`. Measuring resets CUDA's peak statistics, and begins when this is first called.
        """
        # A process that never asks, as a trainer with the target in it, keeps its own peak statistics.
        self._is_asked = self._device.type == "cuda"
        fixed = min(self._tiny, default=0)
        bytes_per_token = self._bytes_per_token(fixed)
        if not self._is_asked or not bytes_per_token:
            return None
        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return max(1, int((USABLE_SHARE * (free + unused) - fixed) / bytes_per_token))

    @contextmanager
    def measuring(self, tokens: int) -> Iterator[None]:
        """Measure a forward of so many tokens inside."""
        is_telling = 0 < tokens <= FIXED_TOKENS or tokens >= SIZEABLE_TOKENS
        if not self._is_asked or not is_telling:
            yield
            return
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._is_alone = True
        yield
        taken = _Taken(tokens, torch.cuda.max_memory_allocated(self._device) - before)
        if tokens >= SIZEABLE_TOKENS:
            (self._alone if self._is_alone else self._accompanied).append(taken)
        elif self._is_alone:
            self._tiny.append(taken.nbytes)

    def note_head(self) -> None:
        """The head runs: a forward that is measured meanwhile, by another thread, is not alone."""
        self._is_alone = False

    def _bytes_per_token(self, fixed: int) -> float:
        """What a token takes at most; 0 while nothing is known."""
        if self._alone:
            return max(_per_token(taken, fixed) for taken in self._alone)
        # Each is too much by what the head took, which is least where it is spread over many tokens.
        return min((_per_token(taken, fixed) for taken in self._accompanied), default=0.0)


def _per_token(taken: _Taken, fixed: int) -> float:
    # Whatever the fixed part seems to be, the tokens of a sizeable forward take half of it.
    return max(taken.nbytes - fixed, taken.nbytes / 2) / taken.tokens
