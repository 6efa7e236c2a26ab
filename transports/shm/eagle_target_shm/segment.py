"""A nameless segment of shared memory, and the locks that settle which of two processes has a loan."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.errors import ConnectError
from eagle_target.memory import tensor_in
from eagle_target.shared_memory import SharedBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

# What stands at the start of a segment, and how much of it is kept free of tensors.
PROBE_BYTES = 32
HEAD_BYTES = 4096
# struct flock of 64-bit Linux: type, whence, start, length, pid.
LOCK_FORMAT = "hhqqi0q"


class Segment(SharedBlock):
    """Shared memory of one channel, whose descriptor is this process's alone: locks on it belong to that."""

    file_name = "eagle-target-shm"

    def __init__(self, descriptor: int, size: int) -> None:
        super().__init__(descriptor, size)
        self.device = torch.device("cpu")
        self._address = torch.frombuffer(self.map, dtype=torch.uint8).data_ptr()
        self.prefer_huge_pages()

    @classmethod
    def receive(cls, given: int, size: int) -> Self:
        """Map a segment whose descriptor came from its maker; that descriptor stays open.

        Raises:
            ConnectError: it is not what was announced.
        """
        try:
            return super().receive(given, size)
        except ValueError as error:
            raise ConnectError(f"the server's {error}") from error

    def tensor(
        self, offset: int, shape: Sequence[int], dtype: torch.dtype, released: Callable[..., Any], *arguments: Any
    ) -> torch.Tensor:
        """A tensor at an offset; see `tensor_in`."""
        return tensor_in(self.map, offset, shape, dtype, released, *arguments)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where a contiguous tensor of this process begins in the segment; None if it lies elsewhere."""
        offset = tensor.data_ptr() - self._address
        inside = tensor.device.type == "cpu" and 0 <= offset <= self.size - tensor.nbytes
        return offset if inside and tensor.is_contiguous() else None

    def write_probe(self, probe: bytes) -> None:
        """Write what shows a peer that it mapped this very segment."""
        self.map[: len(probe)] = probe

    def read_probe(self) -> bytes:
        """Read it."""
        return self.map[:PROBE_BYTES]

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
