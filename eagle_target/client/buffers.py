"""CPU memory for batches, used again once nothing refers to it.

Touching fresh memory costs more than filling it from a socket, so a trainer's next batch takes the memory of one it
has let go of.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALL_BYTES = 1 << 20
ROUNDING_BYTES = 2 << 20


class BufferPool:
    """Allocates tensors whose memory comes back when the last tensor that shares it is gone.

    Args:
        max_idle_bytes: memory kept for later; more is given back to the system.
    """

    def __init__(self, max_idle_bytes: int = 2 << 30) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: defaultdict[int, list[mmap.mmap]] = defaultdict(list)
        # A tensor may die, and with it return memory, while this very thread allocates.
        self._lock = threading.RLock()
        self._closed = False
        self.idle_bytes = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised CPU tensor; small ones come from torch's own allocator."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALL_BYTES:
            return torch.empty(tuple(shape), dtype=dtype)
        block = self._take(-(-size // ROUNDING_BYTES) * ROUNDING_BYTES)
        # The storage keeps this object alive, whatever views are made of the tensor, and nothing else does.
        lease = (ctypes.c_uint8 * size).from_buffer(block)
        weakref.finalize(lease, self._give_back, block).atexit = False
        return torch.frombuffer(lease, dtype=torch.uint8).view(dtype).view(tuple(shape))

    def close(self) -> None:
        """Give idle memory back; what is in use follows when it is let go of."""
        with self._lock:
            self._closed = True
            self._idle.clear()
            self.idle_bytes = 0

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            if self._idle[size]:
                self.idle_bytes -= size
                return self._idle[size].pop()
        block = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _give_back(self, block: mmap.mmap) -> None:
        with self._lock:
            if not self._closed and self.idle_bytes + len(block) <= self._max_idle_bytes:
                self.idle_bytes += len(block)
                self._idle[len(block)].append(block)
