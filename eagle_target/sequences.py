"""Padded and packed rows <-> ragged sequences. Pure functions, on the CPU.

batch x seq rows hold sequences; tokens = all real tokens, packed in row order.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Sequence

    SeqLens = torch.Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowLayout:
    """Where each sequence of a batch lies.

    seq_lens: tokens of each sequence, in order.
    token_positions: int64 `[tokens]`, index of each token into the flattened `[batch*seq]` rows.
    is_first, is_last: bool `[tokens]`, whether a token starts or ends its sequence.
    """

    batch: int
    seq: int
    seq_lens: tuple[int, ...]
    token_positions: torch.Tensor
    is_first: torch.Tensor
    is_last: torch.Tensor

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """`[batch, seq]` -> `[tokens]`."""
        return rows.flatten()[self.token_positions.to(rows.device)]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """`[tokens]` -> `[batch, seq]`, zero at pads."""
        out = torch.zeros(self.batch * self.seq, dtype=packed.dtype, device=packed.device)
        out[self.token_positions.to(packed.device)] = packed
        return out.view(self.batch, self.seq)

    def shift_left(self, rows: torch.Tensor) -> torch.Tensor:
        """`[batch, seq]` shifted left by one within each sequence; zero at its end and at pads."""
        packed = self.pack(rows)
        shifted = torch.zeros_like(packed)
        shifted[:-1] = packed[1:]
        shifted[self.is_last.to(rows.device)] = 0
        return self.unpack(shifted)

    def position_ids(self) -> torch.Tensor:
        """int64 `[tokens]`: 0, 1, 2, ... within each sequence."""
        lengths = torch.tensor(self.seq_lens, dtype=torch.int64)
        starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        return torch.arange(len(self.token_positions)) - starts

    def doc_remaining(self) -> torch.Tensor:
        """int64 `[tokens]`: real tokens after each one within its sequence."""
        lengths = torch.tensor(self.seq_lens, dtype=torch.int64)
        return torch.repeat_interleave(lengths, lengths) - 1 - self.position_ids()


def lay_out_rows(attention_mask: torch.Tensor, seq_lens: SeqLens | None = None) -> RowLayout:
    """Find the sequences of `[batch, seq]` rows.

    Without `seq_lens` a row is one sequence, padded left, right, both or not at all, or empty.
    With it (`[batch, docs]`, zero-padded, or lists) a row holds documents one after another: the lengths add up
    either to the row's real tokens, or to the row's width with pads folded into the outer documents, which is how
    NeMo AutoModel packs.

    Raises:
        ContractError: a mask with holes, or lengths that do not add up.
    """
    batch, seq = attention_mask.shape
    mask = attention_mask.detach().to("cpu", torch.bool)
    counts = mask.sum(1)
    firsts = torch.where(counts > 0, mask.to(torch.uint8).argmax(1), 0)
    _check_no_holes(mask, firsts, counts)
    starts, lengths = firsts.tolist(), counts.tolist()
    documents = None if seq_lens is None else _document_lengths(seq_lens, batch)
    spans: list[tuple[int, int]] = []
    for row in range(batch):
        first, length = starts[row], lengths[row]
        cuts = [length] if documents is None else _cut_row(row, documents[row], first, length, seq)
        for cut in cuts:
            if cut:
                spans.append((row * seq + first, cut))
                first += cut
    if not spans:
        raise ContractError(f"attention_mask {[batch, seq]} is all zero: a batch needs at least one real token")
    return _layout_of_spans(batch, seq, spans)


def _layout_of_spans(batch: int, seq: int, spans: list[tuple[int, int]]) -> RowLayout:
    starts = torch.tensor([start for start, _ in spans])
    lengths = torch.tensor([length for _, length in spans])
    ends = lengths.cumsum(0)
    within = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends - lengths, lengths)
    is_last = torch.zeros(int(ends[-1]), dtype=torch.bool)
    is_last[ends - 1] = True
    return RowLayout(
        batch=batch,
        seq=seq,
        seq_lens=tuple(length for _, length in spans),
        token_positions=torch.repeat_interleave(starts, lengths) + within,
        is_first=within == 0,
        is_last=is_last,
    )


def _check_no_holes(mask: torch.Tensor, firsts: torch.Tensor, counts: torch.Tensor) -> None:
    columns = torch.arange(mask.shape[1])
    expected = (columns >= firsts[:, None]) & (columns < (firsts + counts)[:, None])
    holes = (expected & ~mask).nonzero()
    if len(holes):
        row, column = holes[0].tolist()
        raise ContractError(
            f"attention_mask has a hole at row {row}, position {column}: real tokens of a row must be contiguous; "
            "give documents of a packed row through seq_lens"
        )


def _document_lengths(seq_lens: SeqLens, batch: int) -> list[list[int]]:
    if isinstance(seq_lens, torch.Tensor) and (seq_lens.dim() != 2 or seq_lens.is_floating_point()):
        raise ContractError(
            f"seq_lens must be integers [batch, docs], got {seq_lens.dtype} {list(seq_lens.shape)}: "
            "pad rows of fewer documents with zeros"
        )
    try:
        listed = seq_lens.tolist() if isinstance(seq_lens, torch.Tensor) else seq_lens
        rows = [[operator.index(length) for length in row] for row in listed]
    except TypeError as error:
        raise ContractError(
            f"seq_lens must be integers [batch, docs], got {seq_lens!r}: give one list of lengths for each row"
        ) from error
    if len(rows) != batch:
        raise ContractError(f"seq_lens has {len(rows)} rows, the batch has {batch}")
    for row, lengths in enumerate(rows):
        if any(length < 0 for length in lengths):
            raise ContractError(f"seq_lens row {row} has a negative length: {lengths}")
    return rows


def _cut_row(row: int, lengths: list[int], first: int, count: int, seq: int) -> list[int]:
    """Return the real tokens of each document of one row."""
    total = sum(lengths)
    if total == count:
        return lengths
    if total != seq:
        raise ContractError(
            f"seq_lens row {row} adds up to {total} ({[n for n in lengths if n]}): it must be the row's {count} real "
            f"tokens, or its width {seq} with the pads folded into the outer documents"
        )
    cuts, start = [], 0
    for length in lengths:
        overlap = min(start + length, first + count) - max(start, first)
        if length and overlap <= 0:
            raise ContractError(
                f"seq_lens row {row} has a document at positions {start} to {start + length - 1} that is all pads: "
                "leave it out, or correct attention_mask"
            )
        cuts.append(max(overlap, 0))
        start += length
    return cuts
