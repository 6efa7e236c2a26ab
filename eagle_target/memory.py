"""Memory used again: pools of ordinary and of pinned memory, and memory registered with CUDA."""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SMALL_BYTES = 1 << 20
ROUNDING_BYTES = 2 << 20
# An idle block may be larger than what is asked for by this part of it: answers rarely have the same size twice.
SPARE_PART = 1 / 4
logger = logging.getLogger(__name__)
# Pinning takes a second for some 4 GiB, so that memory for small tensors is pinned together.
SLAB_BYTES = 64 << 20
ALIGNMENT = 512
# cudaHostRegisterPortable: pinned for every device, whichever is current.
PORTABLE = 1
# What cudaHostRegister says most often: no memory, the system's call failed, already registered.
OUT_OF_MEMORY, OPERATING_SYSTEM, ALREADY_REGISTERED = 2, 304, 712
# What torch raises without CUDA, in a process that was forked from one with it, and after an error that stays.
NO_RUNTIME = (RuntimeError, AssertionError)
# Memory that CUDA does not let go of: it must not be unmapped, or what is mapped there next would be taken for pinned.
_kept: list[object] = []

Block = TypeVar("Block")
Returned = TypeVar("Returned")


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


def tensor_in(
    memory: mmap.mmap,
    offset: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    released: Callable[..., object],
    *arguments: object,
) -> torch.Tensor:
    """An uninitialised tensor in a block of memory, which is mapped as long as anything shares the tensor's part of it.

    Args:
        released: called with `arguments` when nothing does any more: at any point of any thread.

    Raises:
        ValueError: it is empty, or ends outside the block.
    """
    size = math.prod(shape) * dtype.itemsize
    if not 0 < size <= len(memory) - offset:
        raise ValueError(f"{size} bytes at {offset} are no part of a block of {len(memory)} bytes")
    # The storage keeps this object alive, whatever views are made of the tensor, and nothing else does.
    part = memoryview(memory)[offset : offset + size]
    weakref.finalize(part, released, *arguments).atexit = False
    return torch.frombuffer(part, dtype=torch.uint8).view(dtype).view(tuple(shape))


class Extents:
    """Which bytes of a block are free, from `start` to `end`."""

    def __init__(self, start: int, end: int) -> None:
        self._whole = [(start, end)]
        self._free = [(start, end)]

    @property
    def largest(self) -> int:
        """The most that `take` can be asked for."""
        return max((end - start for start, end in self._free), default=0)

    @property
    def free_bytes(self) -> int:
        """All that is free."""
        return sum(end - start for start, end in self._free)

    @property
    def is_free(self) -> bool:
        """Whether nothing is taken."""
        return self._free == self._whole

    def take(self, size: int) -> int | None:
        """Where bytes begin that are free no more: of the smallest free part that has room; None where none has."""
        fitting = [part for part in self._free if part[1] - part[0] >= size]
        return self._cut(min(fitting, key=lambda part: part[1] - part[0]), 0, size) if fitting else None

    def take_low(self, size: int, alignment: int) -> int | None:
        """As `take`, at the lowest place there is, a multiple of the alignment."""
        for part in self._free:
            padding = -part[0] % alignment
            if part[0] + padding + size <= part[1]:
                return self._cut(part, padding, size)
        return None

    def take_high(self, size: int) -> int | None:
        """As `take`, at the highest place there is."""
        for part in reversed(self._free):
            if part[1] - size >= part[0]:
                return self._cut(part, part[1] - size - part[0], size)
        return None

    def give_back(self, offset: int, size: int) -> None:
        """Make bytes free again."""
        index = bisect_left(self._free, (offset, offset))
        start, end = offset, offset + size
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))

    def _cut(self, part: tuple[int, int], skipped: int, size: int) -> int:
        index, offset = bisect_left(self._free, part), part[0] + skipped
        left = ((part[0], offset), (offset + size, part[1]))
        self._free[index : index + 1] = [(start, end) for start, end in left if start < end]
        return offset


class IdleBlocks(Generic[Block]):
    """Blocks that nothing is in, kept for later. One thread at a time.

    Args:
        spare: a block may be larger than what is asked for by this many times as much.
        max_bytes, max_blocks: that are kept; beyond them blocks of the size not used for longest go.
    """

    def __init__(self, *, spare: float, max_bytes: float = math.inf, max_blocks: float = math.inf) -> None:
        self._spare = spare
        self._max_bytes = max_bytes
        self._max_blocks = max_blocks
        # By size, the size used last at the end; each block with the time at which it came back.
        self._by_size: OrderedDict[int, list[tuple[float, Block]]] = OrderedDict()
        self._count = 0
        self.nbytes = 0

    def take(self, size: int) -> Block | None:
        """The smallest block that will do for so many bytes; None where there is none."""
        fitting = min((idle for idle in self._by_size if size <= idle <= size + size * self._spare), default=None)
        if fitting is None:
            return None
        self._by_size.move_to_end(fitting)
        return self._remove(fitting, -1)

    def put(self, size: int, block: Block) -> list[Block]:
        """Keep a block; those that are kept no more, which may be this one."""
        if size > self._max_bytes:
            return [block]
        gone = []
        while self.nbytes + size > self._max_bytes or self._count >= self._max_blocks:
            gone.append(self._remove(next(iter(self._by_size)), 0))
        self._by_size.setdefault(size, []).append((time.monotonic(), block))
        self._by_size.move_to_end(size)
        self._count += 1
        self.nbytes += size
        return gone

    def trim(self, idle_seconds: float) -> None:
        """Drop blocks that nothing has used for that long."""
        oldest = time.monotonic() - idle_seconds
        for size, blocks in list(self._by_size.items()):
            for _ in [entry for entry in blocks if entry[0] <= oldest]:
                self._remove(size, 0)

    def _remove(self, size: int, index: int) -> Block:
        blocks = self._by_size[size]
        _, block = blocks.pop(index)
        if not blocks:
            del self._by_size[size]
        self._count -= 1
        self.nbytes -= size
        return block


class _Pool(ABC, Generic[Returned]):
    """Makes free what comes back.

    A tensor may die, and with it return memory, in the middle of anything, in any thread, also of this pool's work.
    So what it returns is queued, and made free by a call that has the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._returned: queue.SimpleQueue[Returned] = queue.SimpleQueue()
        self._closed = False

    def _collect(self) -> None:
        """Make free what was given back, unless another call is at it, which then does this, too."""
        while not self._returned.empty() and self._lock.acquire(blocking=False):
            try:
                self._take_back([self._returned.get_nowait() for _ in range(self._returned.qsize())])
            finally:
                self._lock.release()

    @abstractmethod
    def _take_back(self, returned: Sequence[Returned]) -> None:
        """Make parts free; the lock is held, so nobody else takes from the queue."""


class BufferPool(_Pool[mmap.mmap]):
    """Allocates tensors whose memory comes back when the last tensor that shares it is gone.

    Args:
        max_idle_bytes: memory kept for later; beyond it the sizes not used for longest go back to the system.
    """

    def __init__(self, max_idle_bytes: int = 2 << 30) -> None:
        super().__init__()
        self._idle = IdleBlocks[mmap.mmap](spare=SPARE_PART, max_bytes=max_idle_bytes)

    @property
    def idle_bytes(self) -> int:
        """Memory that is kept for later."""
        self._collect()
        return self._idle.nbytes

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised CPU tensor; small ones come from torch's own allocator."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALL_BYTES:
            return torch.empty(tuple(shape), dtype=dtype)
        rounded = -(-size // ROUNDING_BYTES) * ROUNDING_BYTES
        self._collect()
        with self._lock:
            block = self._idle.take(rounded)
        if block is None:
            block = new_block(rounded)
        return tensor_in(block, 0, shape, dtype, self._give_back, block)

    def close(self) -> None:
        """Give idle memory back; what is in use follows when it is let go of."""
        self._closed = True
        self._collect()
        with self._lock:
            self._idle.trim(0)

    def trim(self, idle_seconds: float) -> None:
        """Give back memory that nothing has used for that long."""
        self._collect()
        with self._lock:
            self._idle.trim(idle_seconds)

    def _give_back(self, block: mmap.mmap) -> None:
        self._returned.put(block)
        self._collect()

    def _take_back(self, returned: Sequence[mmap.mmap]) -> None:
        if not self._closed:
            for block in returned:
                self._idle.put(len(block), block)


class Registration:
    """CUDA's registration of a block of memory; it ends with `release`, or when nothing refers to this any more.

    Args:
        device: whose context is used: a thread that used none yet would get one on the first GPU. block: the memory,
            which is there until it is registered no more.

    Raises:
        OSError: CUDA will not, and why. Its last error is cleared, so that no later call reports it.
    """

    def __init__(self, device: torch.device, block: mmap.mmap) -> None:
        address = torch.frombuffer(block, dtype=torch.uint8).data_ptr()
        reason = _call(device, "cudaHostRegister", address, len(block), PORTABLE)
        if reason is not None:
            raise OSError(reason)
        self._release = weakref.finalize(self, _unregister, device, block, address, os.getpid())
        self._release.atexit = False

    def release(self) -> None:
        """End it. Safe to call twice."""
        self._release()


def _unregister(device: torch.device, block: mmap.mmap, address: int, pid: int) -> None:
    if pid != os.getpid():
        return  # A process that was forked since has the memory, but no CUDA.
    _kept.append(block)
    reason = _call(device, "cudaHostUnregister", address)
    if reason is None:
        _kept.remove(block)
    else:
        logger.warning("CUDA does not unpin %d bytes, which are kept: %s", len(block), reason)


def _call(device: torch.device, function: str, *arguments: int) -> str | None:
    """Call the runtime that torch uses; None, or why that failed."""
    cuda: Any = torch.cuda
    try:
        with torch.cuda.device(device):
            runtime = cuda.cudart()
            status = getattr(runtime, function)(*arguments)
            if not int(status):
                return None
            _clear_last_error()
            return f"{function} says {runtime.cudaGetErrorString(status)} ({int(status)}){_hint(int(status))}"
    except NO_RUNTIME as error:
        return str(error)


def _clear_last_error() -> None:
    """Take a failed call's error off this thread, else torch's check of its next kernel raises it.

    torch 2.6 to 2.13 has no such call, so it is asked of the library that torch has loaded.
    """
    major = (torch.version.cuda or "").partition(".")[0]
    # Where torch was built with the runtime in it there is no library, and no way to its state.
    with suppress(OSError):
        ctypes.CDLL(f"libcudart.so.{major}").cudaGetLastError()


def _hint(status: int) -> str:
    """What may be the matter."""
    if status == ALREADY_REGISTERED:
        return ": something else has registered a part of it"
    if status not in (OUT_OF_MEMORY, OPERATING_SYSTEM) or os.name != "posix":
        return ""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "" if limit == resource.RLIM_INFINITY else f": the process may lock {limit} bytes (RLIMIT_MEMLOCK)"


class PinnedPool(_Pool["tuple[_Slab, int, int]"]):
    """Allocates pinned tensors whose memory comes back when the last tensor that shares it is gone.

    It is cut from slabs. A slab that nothing is in is kept for later, or given back to the system. Memory is used
    again at once: a tensor must be there until copies to it and from it are over.

    Args:
        device: whose copies it is for. slab_bytes: of a slab, unless a tensor needs a larger one.
        max_idle_bytes: kept for later in slabs that nothing is in; beyond it those not used for longest go.
    """

    def __init__(self, device: torch.device, *, slab_bytes: int = SLAB_BYTES, max_idle_bytes: int = 2 << 30) -> None:
        super().__init__()
        self._device = device
        self._slab_bytes = slab_bytes
        self._max_idle_bytes = max_idle_bytes
        self._slabs: list[_Slab] = []
        self._pageable = BufferPool(max_idle_bytes)
        self._has_failed = False

    @property
    def pinned_bytes(self) -> int:
        """Memory that is pinned now, whether a tensor is in it or not."""
        with self._lock:
            return sum(slab.size for slab in self._slabs)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised CPU tensor; in pageable memory where CUDA pins no more."""
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(tuple(shape), dtype=dtype)
        self._collect()
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        with self._lock:
            fitting = [] if self._closed else [slab for slab in self._slabs if slab.free.largest >= padded]
            # The fullest, so that others become free as a whole.
            slab = min(fitting, key=lambda one: one.free.free_bytes, default=None) or self._add(padded)
            offset = None if slab is None else slab.free.take(padded)
        if slab is None or offset is None:
            return self._pageable.allocate(shape, dtype)
        return tensor_in(slab.block, offset, shape, dtype, self._give_back, slab, offset, padded)

    def trim(self, idle_seconds: float) -> None:
        """Give back slabs that nothing has been in for that long."""
        self._collect()
        oldest = time.monotonic() - idle_seconds
        with self._lock:
            self._drop([slab for slab in self._slabs if slab.is_free and slab.free_since <= oldest])
        self._pageable.trim(idle_seconds)

    def close(self) -> None:
        """Give back what is free; what is in use follows when it is let go of."""
        self._closed = True
        self._collect()
        self.trim(0)
        self._pageable.close()

    def _add(self, size: int) -> _Slab | None:
        """Pin another slab; None where CUDA will not."""
        if self._closed:
            return None
        size = max(self._slab_bytes, -(-size // ROUNDING_BYTES) * ROUNDING_BYTES)
        try:
            self._slabs.append(_Slab(self._device, size))
        except OSError as error:
            if not self._has_failed:
                logger.warning(
                    "CUDA pins no %d bytes beside %d, so copies of answers are slower: %s",
                    size,
                    sum(slab.size for slab in self._slabs),
                    error,
                )
            self._has_failed = True
            return None
        return self._slabs[-1]

    def _give_back(self, slab: _Slab, offset: int, size: int) -> None:
        self._returned.put((slab, offset, size))
        # Nobody allocates or trims any more.
        if self._closed:
            self._collect()

    def _take_back(self, returned: Sequence[tuple[_Slab, int, int]]) -> None:
        for slab, offset, size in returned:
            slab.give_back(offset, size)
        free = sorted((slab for slab in self._slabs if slab.is_free), key=lambda slab: slab.free_since)
        kept = 0 if self._closed else self._max_idle_bytes
        excess = sum(slab.size for slab in free) - kept
        dropped = []
        for slab in free:
            if excess <= 0:
                break
            dropped.append(slab)
            excess -= slab.size
        self._drop(dropped)

    def _drop(self, slabs: list[_Slab]) -> None:
        for slab in slabs:
            self._slabs.remove(slab)
            slab.registration.release()


class _Slab:
    """A registered block of memory. free: which parts of it are. free_since: when it was last used."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.block = new_block(size)
        self.size = size
        self.registration = Registration(device, self.block)
        self.free = Extents(0, size)
        self.free_since = time.monotonic()

    @property
    def is_free(self) -> bool:
        """Whether nothing is in it."""
        return self.free.is_free

    def give_back(self, offset: int, size: int) -> None:
        """Make a part free again."""
        self.free.give_back(offset, size)
        self.free_since = time.monotonic()
