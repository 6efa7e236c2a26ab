"""A nameless segment of shared memory, and the locks that settle which of two processes has a loan."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import weakref
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.errors import ConnectError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

# What stands at the start of a segment, and how much of it is kept free of tensors.
PROBE_BYTES = 32
HEAD_BYTES = 4096
# Of fixed size: no peer can cut off memory that this process touches.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# struct flock of 64-bit Linux: type, whence, start, length, pid.
LOCK_FORMAT = "hhqqi0q"


class Segment:
    """Shared memory, mapped as long as this object or a tensor in it lives.

    descriptor: a file description of this process alone, to which its locks belong. size: bytes.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.device = torch.device("cpu")
        self.descriptor = descriptor
        self.size = size
        self.close = weakref.finalize(self, os.close, descriptor)
        self.close.atexit = False
        self._map = mmap.mmap(descriptor, size)
        self._address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()

    @classmethod
    def create(cls, size: int) -> Self:
        """Make a segment; its memory is taken when it is first written to, in huge pages where the kernel does that."""
        descriptor = os.memfd_create("eagle-target-shm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(descriptor)
            raise
        segment = cls(descriptor, size)
        segment.prefer_huge_pages()
        return segment

    @classmethod
    def open(cls, given: int, size: int) -> Self:
        """Map a segment whose descriptor came from its maker; that descriptor stays open.

        Raises:
            ConnectError: it is not what was announced.
        """
        seals, length = fcntl.fcntl(given, fcntl.F_GET_SEALS), os.fstat(given).st_size
        if seals & SEALS != SEALS or length != size:
            raise ConnectError(f"the server's shared memory has {length} bytes and seals {seals}, expected {size}")
        # A descriptor that was handed over shares its locks with its maker; one that was opened here does not.
        segment = cls(os.open(f"/proc/self/fd/{given}", os.O_RDWR | os.O_CLOEXEC), size)
        segment.prefer_huge_pages()
        return segment

    def prefer_huge_pages(self) -> None:
        """Ask for huge pages; without them it works as well, and slower."""
        try:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            # Kernels built without them say EINVAL.
            if error.errno != 22:
                raise

    def tensor(
        self, offset: int, shape: Sequence[int], dtype: torch.dtype, released: Callable[..., Any], *arguments: Any
    ) -> torch.Tensor:
        """A tensor at an offset; `released(*arguments)` is called when nothing refers to its memory any more.

        Raises:
            ValueError: the tensor is empty, or ends outside the segment.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if not 0 < size <= self.size - offset:
            raise ValueError(f"{size} bytes at {offset} are no part of a segment of {self.size} bytes")
        # The tensor's storage keeps this object alive, whatever views are made of it, and nothing else does.
        part = memoryview(self._map)[offset : offset + size]
        weakref.finalize(part, released, *arguments).atexit = False
        return torch.frombuffer(part, dtype=torch.uint8).view(dtype).view(tuple(shape))

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where a contiguous tensor of this process begins in the segment; None if it lies elsewhere."""
        offset = tensor.data_ptr() - self._address
        inside = tensor.device.type == "cpu" and 0 <= offset <= self.size - tensor.nbytes
        return offset if inside and tensor.is_contiguous() else None

    def write_probe(self, probe: bytes) -> None:
        """Write what shows a peer that it mapped this very segment."""
        self._map[: len(probe)] = probe

    def read_probe(self) -> bytes:
        """Read it."""
        return self._map[:PROBE_BYTES]

    def lock(self, number: int) -> bool:
        """Take the lock of a number, for this process alone; whether it was to be had. The kernel drops a dead's."""
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK, number))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def unlock(self, number: int) -> None:
        """Let go of the lock of a number."""
        fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, number))


def _lock(kind: int, number: int) -> bytes:
    return struct.pack(LOCK_FORMAT, kind, os.SEEK_SET, number, 1, 0)
