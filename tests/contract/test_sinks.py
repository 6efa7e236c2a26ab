"""Where rows of a tensor go."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle_target.contract.sinks import PackedTensors, RowStore, contiguous_runs, scattered_store

if TYPE_CHECKING:
    from collections.abc import Sequence

SLOTS = st.sets(st.integers(0, 15)).map(sorted)


def garbage(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory that was never zeroed."""
    return torch.full(tuple(shape), 77, dtype=dtype)


def test_runs_are_slot_row_and_length() -> None:
    assert contiguous_runs(torch.tensor([2, 3, 4, 7, 9, 10])) == [(2, 0, 3), (7, 3, 1), (9, 4, 2)]
    assert contiguous_runs(torch.tensor([5])) == [(5, 0, 1)]
    assert contiguous_runs(torch.empty(0, dtype=torch.int64)) == []


@given(SLOTS)
def test_runs_cover_the_slots_and_never_touch(slots: list[int]) -> None:
    runs = contiguous_runs(torch.tensor(slots, dtype=torch.int64))
    assert [slot + step for slot, _, length in runs for step in range(length)] == slots
    assert [row + step for _, row, length in runs for step in range(length)] == list(range(len(slots)))
    assert all(slot + length < following for (slot, _, length), (following, _, _) in itertools.pairwise(runs))


@given(SLOTS, st.integers(1, 5), st.sampled_from([torch.float32, torch.int32, torch.bfloat16, torch.bool]))
def test_scattered_rows_arrive_and_gaps_are_zero(slots: list[int], step: int, dtype: torch.dtype) -> None:
    positions = torch.tensor(slots, dtype=torch.int64)
    rows = torch.arange(1, 3 * len(slots) + 1).view(len(slots), 3).to(dtype)
    store = scattered_store(16, rows.shape, dtype, positions, garbage)
    for start in range(0, len(slots), step):
        store.write(start, rows[start : start + step])
    expected = torch.zeros(16, 3, dtype=dtype)
    for slot, row in zip(slots, rows, strict=True):
        expected[slot] = row
    assert store.out.dtype == dtype
    assert torch.equal(store.out, expected)


@given(SLOTS)
def test_views_hold_all_rows_in_order_and_share_memory(slots: list[int]) -> None:
    store = scattered_store(16, (len(slots), 2), torch.int64, torch.tensor(slots, dtype=torch.int64), garbage)
    rows = torch.arange(2 * len(slots)).view(-1, 2)
    store.write(0, rows)
    views = store.views()
    assert all(view.is_contiguous() for view in views)
    assert torch.equal(torch.cat([torch.empty(0, 2, dtype=torch.int64), *views]), rows)
    for view in views:
        view.fill_(-5)
    assert int((store.out == -5).sum()) == 2 * len(slots)


def test_packed_store_is_one_view() -> None:
    store = RowStore(torch.zeros(4, 2))
    store.write(1, torch.ones(2, 2))
    assert store.out.sum(1).tolist() == [0, 2, 2, 0]
    assert store.views() == [store.out]


def test_writing_converts_to_the_stores_dtype() -> None:
    store = scattered_store(4, (2,), torch.bfloat16, torch.tensor([0, 3]), garbage)
    store.write(0, torch.tensor([1.5, 2.5], dtype=torch.float64))
    assert store.out.tolist() == [1.5, 0, 0, 2.5]


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_no_rows_leave_only_zeroes(shape: tuple[int, ...]) -> None:
    store = scattered_store(4, shape, torch.float32, torch.empty(0, dtype=torch.int64), garbage)
    store.write(0, torch.empty(shape))
    assert store.out.shape == (4, *shape[1:])
    assert not store.out.any()
    assert store.views() == []


def test_packed_tensors_keep_whole_tensors_and_allocate_the_rest() -> None:
    sink = PackedTensors()
    whole = torch.ones(3, 2)
    sink.put("whole", whole)
    store = sink.allocate("parts", (3,), torch.int32)
    store.write(0, torch.tensor([1, 2]))
    store.write(2, torch.tensor([3]))
    assert sink["whole"] is whole
    assert sink["parts"].tolist() == [1, 2, 3]
    assert sink["parts"].dtype == torch.int32
