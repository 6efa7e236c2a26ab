"""Parts of a block are given out once, and come back whole."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

import pytest

from eagle_target.memory import Extents

if TYPE_CHECKING:
    from collections.abc import Callable

END = 1 << 16


def test_parts_never_overlap_and_come_back_whole() -> None:
    draw, free = random.Random(0), Extents(64, END)
    ways: list[Callable[[int], int | None]] = [free.take, free.take_high, partial(free.take_low, alignment=256)]
    taken: dict[int, int] = {}
    for _ in range(3000):
        if taken and draw.random() < 0.5:
            offset = draw.choice(list(taken))
            free.give_back(offset, taken.pop(offset))
        else:
            size = draw.choice([1, 64, 100, 5000])
            found = draw.choice(ways)(size)
            if found is None:
                continue
            assert 64 <= found <= END - size
            assert all(found + size <= start or start + length <= found for start, length in taken.items())
            taken[found] = size
        assert free.free_bytes == END - 64 - sum(taken.values())
        assert not (taken and free.is_free)
    for offset, size in taken.items():
        free.give_back(offset, size)
    assert free.is_free
    assert free.largest == END - 64


def test_the_smallest_part_with_room_is_taken() -> None:
    free = Extents(0, 100)
    for size in (30, 10, 20, 10, 30):
        assert free.take(size) is not None
    free.give_back(0, 30)
    free.give_back(40, 20)

    assert free.largest == 30
    assert [free.take(size) for size in (15, 25, 6, 5)] == [40, 0, None, 25]


@pytest.mark.parametrize(("start", "expected"), [(0, 0), (1, 32), (32, 32)])
def test_the_lowest_aligned_place_is_taken(start: int, expected: int) -> None:
    assert Extents(start, 96).take_low(32, 32) == expected


def test_the_highest_place_is_taken() -> None:
    free = Extents(0, 96)
    assert [free.take_high(40) for _ in range(3)] == [56, 16, None]
