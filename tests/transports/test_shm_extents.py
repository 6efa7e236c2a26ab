"""Free bytes are given out once, and come back whole."""

from __future__ import annotations

import random

from eagle_target_shm.extents import LARGE_ALIGNMENT, padded, place

from eagle_target.memory import Extents

END = 64 << 20


def test_random_blocks_never_overlap_and_all_room_comes_back() -> None:
    draw = random.Random(0)
    free = Extents(LARGE_ALIGNMENT, END)
    taken: dict[int, int] = {}
    for _ in range(3000):
        if taken and draw.random() < 0.5:
            offset = draw.choice(list(taken))
            free.give_back(offset, taken.pop(offset))
        else:
            size = padded(draw.choice([1, 64, 100, 5000, LARGE_ALIGNMENT, 3 * LARGE_ALIGNMENT + 1]))
            offset = place(free, size) or 0
            if offset:
                assert offset >= LARGE_ALIGNMENT
                assert offset + size <= END
                assert not offset % (LARGE_ALIGNMENT if size >= LARGE_ALIGNMENT else 64)
                assert all(offset + size <= start or start + length <= offset for start, length in taken.items())
                taken[offset] = size
    for offset, size in taken.items():
        free.give_back(offset, size)
    assert place(free, END - LARGE_ALIGNMENT) == LARGE_ALIGNMENT
    assert place(free, 64) is None


def test_small_blocks_leave_room_for_large_ones() -> None:
    free = Extents(0, END)
    for _ in range(100):
        place(free, 64)
    assert place(free, END - LARGE_ALIGNMENT) == 0
