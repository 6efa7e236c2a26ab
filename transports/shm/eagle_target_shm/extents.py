"""Which bytes of a segment are free."""

from __future__ import annotations

from bisect import bisect_left

SMALL_ALIGNMENT = 64
# Where the kernel uses huge pages for shared memory, they are this large.
LARGE_ALIGNMENT = 2 << 20


class Extents:
    """Free bytes, from `start` to `end`, multiples of the small alignment.

    Large blocks are taken from the lower end, small ones from the upper: neither breaks the other's room into pieces.
    """

    def __init__(self, start: int, end: int) -> None:
        self._free = [(start, end)]

    def take(self, size: int) -> int | None:
        """The offset of `size` bytes, as `padded` gives them, that are free no more; None where there is no room."""
        return self._take_low(size) if size >= LARGE_ALIGNMENT else self._take_high(size)

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

    def _take_low(self, size: int) -> int | None:
        for index, (start, end) in enumerate(self._free):
            offset = -(-start // LARGE_ALIGNMENT) * LARGE_ALIGNMENT
            if offset + size <= end:
                self._cut(index, offset, offset + size)
                return offset
        return None

    def _take_high(self, size: int) -> int | None:
        for index in reversed(range(len(self._free))):
            start, end = self._free[index]
            if end - size >= start:
                self._cut(index, end - size, end)
                return end - size
        return None

    def _cut(self, index: int, start: int, end: int) -> None:
        before, after = (self._free[index][0], start), (end, self._free[index][1])
        self._free[index : index + 1] = [part for part in (before, after) if part[0] < part[1]]


def padded(size: int) -> int:
    """The bytes that a block of `size` bytes takes."""
    alignment = LARGE_ALIGNMENT if size >= LARGE_ALIGNMENT else SMALL_ALIGNMENT
    return -(-size // alignment) * alignment
