"""Where tensors lie in a segment."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eagle_target.memory import Extents

SMALL_ALIGNMENT = 64
# Where the kernel uses huge pages for shared memory, they are this large.
LARGE_ALIGNMENT = 2 << 20


def place(free: Extents, size: int) -> int | None:
    """Take `size` bytes, as `padded` gives them; None where there is no room.

    Large blocks are taken from the lower end, small ones from the upper: neither breaks the other's room into pieces.
    """
    return free.take_low(size, LARGE_ALIGNMENT) if size >= LARGE_ALIGNMENT else free.take_high(size)


def padded(size: int) -> int:
    """The bytes that a block of `size` bytes takes."""
    alignment = LARGE_ALIGNMENT if size >= LARGE_ALIGNMENT else SMALL_ALIGNMENT
    return -(-size // alignment) * alignment
