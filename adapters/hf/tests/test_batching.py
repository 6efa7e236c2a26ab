"""How sequences are split into batches, without any model."""

from __future__ import annotations

import pytest
import torch
from eagle_target_hf.batching import FORWARD_COST, Layout, PlannedBatch, plan_batches

CPU = torch.device("cpu")
LAYOUTS: list[Layout] = ["packed", "padded", "masked", "equal"]


def plan(
    *seq_lens: int, layout: Layout = "padded", limit: int = 10_000, boundary: int | None = None
) -> list[PlannedBatch]:
    return plan_batches(seq_lens, layout=layout, max_batch_tokens=limit, length_boundary=boundary)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limit", [1, 7, 20, 1000])
@pytest.mark.parametrize("boundary", [None, 4])
def test_every_token_has_exactly_one_slot(layout: Layout, limit: int, boundary: int | None) -> None:
    seq_lens = (5, 3, 3, 1, 9, 5, 4, 4, 12)
    tokens = torch.arange(sum(seq_lens)) * 10
    seen = torch.zeros(len(tokens), dtype=torch.int64)

    for batch in plan(*seq_lens, layout=layout, limit=limit, boundary=boundary):
        assert batch.rows * batch.width <= limit or len(batch.lengths) == 1
        slots = tokens[batch.token_index()].flatten()
        assert len(slots) == batch.rows * batch.width
        for slot, token, length in batch.spans():
            assert torch.equal(slots[slot : slot + length], tokens[token : token + length])
            seen[token : token + length] += 1

    assert torch.equal(seen, torch.ones_like(seen))


def test_padding_is_taken_only_where_it_is_cheaper_than_a_forward() -> None:
    together = plan(FORWARD_COST + 8, 8 + 1)
    apart = plan(FORWARD_COST + 8, 8 - 1)

    assert [batch.lengths for batch in together] == [(FORWARD_COST + 8, 9)]
    assert sorted(batch.lengths for batch in apart) == [(7,), (FORWARD_COST + 8,)]


def test_equal_layout_never_pads() -> None:
    batches = plan(3, 4, 3, 4, 5, layout="equal")

    assert sorted(batch.lengths for batch in batches) == [(3, 3), (4, 4), (5,)]


def test_lengths_on_both_sides_of_the_boundary_never_share_a_batch() -> None:
    assert [batch.lengths for batch in plan(8, 9, 7, 10, boundary=8)] == [(8, 7), (9, 10)]
    assert [batch.lengths for batch in plan(8, 9, 7, 10, boundary=8, layout="packed")] == [(8, 7), (9, 10)]


def test_equal_neighbours_are_one_run() -> None:
    (batch,) = plan(4, 4, 4)

    assert batch.spans() == [(0, 0, 12)]
    assert batch.model_inputs(CPU) == {}


def test_packed_rows_keep_the_order_of_the_request() -> None:
    batches = plan(5, 3, 2, 6, layout="packed", limit=10)

    assert [batch.lengths for batch in batches] == [(5, 3, 2), (6,)]
    inputs = batches[0].model_inputs(CPU)
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 5, 8, 10]
    assert inputs["max_length_q"] == 5


def test_mask_only_where_there_are_pads() -> None:
    (padded,) = plan(3, 2, layout="masked")
    (equal,) = plan(3, 3, layout="masked")

    assert padded.model_inputs(CPU)["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert equal.model_inputs(CPU) == {}
