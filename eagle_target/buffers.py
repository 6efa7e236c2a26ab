"""CPU memory for batches, used again once nothing refers to it.

Touching fresh memory costs more than filling it from a socket, so a trainer's next batch takes the memory of one it
has let go of.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import time
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALL_BYTES = 1 << 20
ROUNDING_BYTES = 2 << 20
# An idle block may be larger than what is asked for by this part of it: answers rarely have the same size twice.
SPARE_PART = 4


def trim_heap() -> bool:
    """Give the system what is free in the C library's heap; False where the library cannot.

    glibc keeps one heap a thread, and of each up to twice the largest block (32 MiB) that was ever allocated: with the
    tiles of a large vocabulary some 64 MB for every thread that makes them. Source: mallopt(3), malloc_trim(3).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    return trim is not None and bool(trim(0))


def new_block(size: int) -> mmap.mmap:
    """Fresh memory of the system."""
    block = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


class BufferPool:
    """Allocates tensors whose memory comes back when the last tensor that shares it is gone.

    Args:
        max_idle_bytes: memory kept for later; beyond it the sizes not used for longest go back to the system.
    """

    def __init__(self, max_idle_bytes: int = 2 << 30) -> None:
        self._max_idle_bytes = max_idle_bytes
        # By size, the size used last at the end; each block with the time at which it came back.
        self._idle: OrderedDict[int, list[tuple[float, mmap.mmap]]] = OrderedDict()
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

    def trim(self, idle_seconds: float) -> None:
        """Give back memory that nothing has used for that long."""
        oldest = time.monotonic() - idle_seconds
        with self._lock:
            for size, blocks in list(self._idle.items()):
                kept = [entry for entry in blocks if entry[0] > oldest]
                self.idle_bytes -= size * (len(blocks) - len(kept))
                self._idle[size] = kept
                if not kept:
                    del self._idle[size]

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            fitting = min((idle for idle in self._idle if size <= idle <= size + size // SPARE_PART), default=None)
            if fitting is not None:
                blocks = self._idle[fitting]
                _, block = blocks.pop()
                self.idle_bytes -= fitting
                self._idle.move_to_end(fitting)
                if not blocks:
                    del self._idle[fitting]
                return block
        return new_block(size)

    def _give_back(self, block: mmap.mmap) -> None:
        size = len(block)
        with self._lock:
            if self._closed or size > self._max_idle_bytes:
                return
            while self.idle_bytes + size > self._max_idle_bytes:
                oldest, blocks = next(iter(self._idle.items()))
                del blocks[0]
                self.idle_bytes -= oldest
                if not blocks:
                    del self._idle[oldest]
            self.idle_bytes += size
            self._idle.setdefault(size, []).append((time.monotonic(), block))
            self._idle.move_to_end(size)
