"""Memory that processes of one machine share. Linux alone has what it is made of."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import weakref
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing import Self

# Of fixed size: nobody can cut off memory that another process touches.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedBlock:
    """Memory that other processes map, of fixed size and without a name: nothing is left behind, whoever dies.

    It is mapped as long as this object or a tensor in it is there. map: its bytes. size: how many. descriptor: by which
    others open it; -1 after `release`. file_name: what the system calls it in /proc.

    Args:
        descriptor: of the memory, taken over.
    """

    file_name: ClassVar[str] = "eagle-target"

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self.size = size
        # A block that nobody released would keep its memory for as long as this process lives.
        self._close = weakref.finalize(self, os.close, descriptor)
        self._close.atexit = False
        self.map = mmap.mmap(descriptor, size)

    @classmethod
    def create(cls, size: int) -> Self:
        """Make a block of zeros, of at least one byte. Its memory is taken when it is first written to.

        Raises:
            OSError: there is no memory for it.
        """
        size = max(size, 1)
        descriptor = os.memfd_create(cls.file_name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, size)

    @classmethod
    def open(cls, pid: int, descriptor: int, size: int) -> Self:
        """Map a block of a process of the same user, by its descriptor there.

        Raises:
            ValueError: it is not what was announced. OSError: it is not there.
        """
        own = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            _require_fixed_size(own, size)
        except BaseException:
            os.close(own)
            raise
        return cls(own, size)

    @classmethod
    def receive(cls, given: int, size: int) -> Self:
        """Map a block whose descriptor was handed over; that one stays open.

        Raises:
            ValueError: it is not what was announced.
        """
        # Before it is opened: opening other things than memory may do something.
        _require_fixed_size(given, size)
        # A descriptor that was handed over shares its locks with its maker; one that was opened here does not.
        return cls.open(os.getpid(), given, size)

    def prefer_huge_pages(self) -> None:
        """Ask for huge pages; without them it works as well, and slower."""
        try:
            self.map.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            # Kernels built without them say so in this way.
            if error.errno != errno.EINVAL:
                raise

    def release(self) -> None:
        """Let no more processes open it; those that have mapped it keep it. Safe to call twice."""
        self.descriptor = -1
        self._close()


def _require_fixed_size(descriptor: int, size: int) -> None:
    seals, length = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS), os.fstat(descriptor).st_size
    if seals & SEALS != SEALS or length != size:
        raise ValueError(f"shared memory has {length} bytes and seals {seals}, expected {size}")
