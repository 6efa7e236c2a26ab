"""Padded and packed rows against plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle_target.compute.layout import RowLayout, lay_out_rows
from eagle_target.errors import ContractError
from tests.compute.layouts import mask_of, packed_masks, padded_masks
from tests.oracle import documents_of_row


def loops(mask: torch.Tensor, seq_lens: list[list[int]] | None) -> list[list[int]]:
    """Flat positions of each sequence."""
    return [
        [row * mask.shape[1] + position for position in document]
        for row, values in enumerate(mask.tolist())
        for document in documents_of_row(values, None if seq_lens is None else seq_lens[row])
    ]


def check_against_loops(layout: RowLayout, mask: torch.Tensor, seq_lens: list[list[int]] | None) -> None:
    documents = loops(mask, seq_lens)
    assert layout.seq_lens == tuple(len(document) for document in documents)
    assert layout.token_positions.tolist() == [position for document in documents for position in document]
    assert layout.is_first.tolist() == [index == 0 for document in documents for index in range(len(document))]
    assert layout.is_last.tolist() == [
        index == len(document) - 1 for document in documents for index in range(len(document))
    ]
    assert layout.position_ids().tolist() == [index for document in documents for index in range(len(document))]
    assert layout.doc_remaining().tolist() == [
        len(document) - 1 - index for document in documents for index in range(len(document))
    ]
    rows = torch.arange(1, mask.numel() + 1).view(mask.shape)
    packed = layout.pack(rows)
    assert packed.tolist() == [position + 1 for document in documents for position in document]
    assert torch.equal(layout.unpack(packed), rows * mask)
    shifted = torch.zeros(mask.numel(), dtype=torch.int64)
    for document in documents:
        for here, following in itertools.pairwise(document):
            shifted[here] = following + 1
    assert torch.equal(layout.shift_left(rows), shifted.view(mask.shape))


@pytest.mark.parametrize(
    ("rows", "seq_lens"),
    [
        pytest.param(["11111", "11111"], (5, 5), id="no pads"),
        pytest.param(["11100", "10000"], (3, 1), id="right pads"),
        pytest.param(["00111", "00001"], (3, 1), id="left pads"),
        pytest.param(["01110", "00100"], (3, 1), id="both"),
        pytest.param(["00000", "01100", "00000"], (2,), id="empty rows"),
        pytest.param(["1"], (1,), id="one token"),
    ],
)
def test_a_row_is_one_sequence_wherever_its_pads_are(rows: list[str], seq_lens: tuple[int, ...]) -> None:
    mask = mask_of(*rows)
    layout = lay_out_rows(mask)
    assert (layout.batch, layout.seq, layout.seq_lens) == (*mask.shape, seq_lens)
    check_against_loops(layout, mask, None)


@pytest.mark.parametrize(
    ("rows", "lengths", "seq_lens"),
    [
        pytest.param(["11111111"], [[3, 4, 1]], (3, 4, 1), id="full row"),
        pytest.param(["11111100", "11111111"], [[2, 4, 0], [1, 6, 1]], (2, 4, 1, 6, 1), id="real tokens, zero-padded"),
        pytest.param(["11111100"], [[0, 2, 0, 4, 0]], (2, 4), id="zeros between"),
        pytest.param(["11111100"], [[2, 6]], (2, 4), id="width, last folds pads"),
        pytest.param(["00111111"], [[2, 4]], (2, 4), id="left pads, real tokens"),
        pytest.param(["00111111"], [[4, 4]], (2, 4), id="left pads, width"),
        pytest.param(["00111100"], [[4, 4]], (2, 2), id="both, width"),
        pytest.param(["00000000", "11000000"], [[0, 0], [1, 1]], (1, 1), id="empty row"),
    ],
)
def test_a_packed_row_is_several_sequences(
    rows: list[str], lengths: list[list[int]], seq_lens: tuple[int, ...]
) -> None:
    mask = mask_of(*rows)
    for given_lengths in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
        layout = lay_out_rows(mask, given_lengths)
        assert layout.seq_lens == seq_lens
        check_against_loops(layout, mask, lengths)


def test_lists_of_documents_need_no_padding() -> None:
    mask = mask_of("11111", "11110")
    assert lay_out_rows(mask, [[1, 4], [4]]).seq_lens == (1, 4, 4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_mask_may_have_any_dtype(dtype: torch.dtype) -> None:
    mask = mask_of("0110", "1111").to(dtype)
    check_against_loops(lay_out_rows(mask), mask.long(), None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_shifting_keeps_the_dtype(dtype: torch.dtype) -> None:
    shifted = lay_out_rows(mask_of("0111")).shift_left(torch.ones(1, 4, dtype=dtype))
    assert shifted.dtype == dtype
    assert shifted.tolist() == [[0, 1, 1, 0]]


def test_shifting_leaves_its_input_alone() -> None:
    rows = torch.arange(8).view(2, 4)
    lay_out_rows(mask_of("1111", "1111")).shift_left(rows)
    assert torch.equal(rows, torch.arange(8).view(2, 4))


@given(padded_masks())
def test_padded_rows_agree_with_loops(mask: torch.Tensor) -> None:
    check_against_loops(lay_out_rows(mask), mask, None)


@given(packed_masks())
def test_packed_rows_agree_with_loops(packed: tuple[torch.Tensor, list[list[int]]]) -> None:
    mask, seq_lens = packed
    check_against_loops(lay_out_rows(mask, torch.tensor(seq_lens)), mask, seq_lens)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_any_mask_is_laid_out_or_refused_for_what_is_wrong(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows).long()
    texts = ["".join(str(value) for value in row).strip("0") for row in mask.tolist()]
    if any("0" in text for text in texts):
        with pytest.raises(ContractError, match="has a hole"):
            lay_out_rows(mask)
    elif not any(texts):
        with pytest.raises(ContractError, match="all zero"):
            lay_out_rows(mask)
    else:
        check_against_loops(lay_out_rows(mask), mask, None)


def test_hole_is_refused_with_its_place() -> None:
    with pytest.raises(ContractError, match=r"hole at row 1, position 2.*through seq_lens"):
        lay_out_rows(mask_of("1111", "1101"))


def test_batch_without_a_token_is_refused() -> None:
    with pytest.raises(ContractError, match=r"\[2, 3\] is all zero"):
        lay_out_rows(mask_of("000", "000"))
    with pytest.raises(ContractError, match="all zero"):
        lay_out_rows(mask_of("000"), [[0]])


@pytest.mark.parametrize(
    ("seq_lens", "message"),
    [
        ([[2, 1], [4, 0]], r"row 0 adds up to 3 \(\[2, 1\]\).*row's 4 real tokens, or its width 6"),
        ([[4, 0], [5, 0]], r"row 1 adds up to 5 \(\[5\]\)"),
        ([[7, 0], [4, 0]], "row 0 adds up to 7"),
        ([[5, -1], [4, 0]], r"row 0 has a negative length: \[5, -1\]"),
        ([[4, 0]], "has 1 rows, the batch has 2"),
        ([[4, 2], [4, 0]], "row 0 has a document at positions 4 to 5 that is all pads"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(seq_lens: list[list[int]], message: str) -> None:
    mask = mask_of("111100", "111100")
    with pytest.raises(ContractError, match=message):
        lay_out_rows(mask, seq_lens)
    with pytest.raises(ContractError, match=message):
        lay_out_rows(mask, torch.tensor(seq_lens))


@pytest.mark.parametrize(
    "seq_lens",
    [torch.tensor([[4.0], [4.0]]), torch.tensor([4, 4]), torch.tensor(4), torch.tensor([[[4], [4]]]), torch.ones(2, 1)],
)
def test_lengths_of_another_kind_are_refused(seq_lens: torch.Tensor) -> None:
    with pytest.raises(ContractError, match=r"seq_lens must be integers \[batch, docs\], got torch"):
        lay_out_rows(mask_of("111100", "111100"), seq_lens)


@pytest.mark.parametrize("seq_lens", [[[4.0], [4.0]], [4, 4], [["4"], ["4"]], [[4], None]])
def test_lists_of_another_kind_are_refused(seq_lens: list[list[int]]) -> None:
    with pytest.raises(ContractError, match=r"seq_lens must be integers \[batch, docs\], got"):
        lay_out_rows(mask_of("111100", "111100"), seq_lens)
