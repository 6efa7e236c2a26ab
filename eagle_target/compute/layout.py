"""From the trainer's rows, padded or packed, to ragged sequences.

A row is one sequence, padded on either side, or several that are packed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch

from eagle_target.contract.request import RowPolicy, SupervisionRequest, check_token_ids
from eagle_target.errors import ContractError, VocabMappingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    SeqLens = torch.Tensor | Sequence[Sequence[int]]
    from collections.abc import Sequence

    from eagle_target.contract.request import Encoding
    from eagle_target.contract.vocab_mapping import VocabMapping


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainerRows:
    """A trainer's checked input: `[batch, seq]` rows, in memory of their own, and where the sequences lie in them.

    supervised: bool `[tokens]`; a token whose prediction bears loss: it is masked in and starts no sequence.
    """

    layout: RowLayout
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor | None
    seq_lens: torch.Tensor | None
    doc_remaining: torch.Tensor | None
    supervised: torch.Tensor

    def row_mask(self, rows: RowPolicy) -> torch.Tensor:
        """Bool `[tokens]`: which rows of the distribution the policy asks for.

        Raises:
            ContractError: an unknown policy.
        """
        if rows not in get_args(RowPolicy):
            raise ContractError(f"rows must be one of {get_args(RowPolicy)}, got {rows!r}")
        return self.supervised if rows == "supervised" else ~self.layout.is_first

    def request(
        self, *, encoding: Encoding, rows: RowPolicy, mapping: VocabMapping | None, probs_dtype: torch.dtype
    ) -> SupervisionRequest:
        """The ragged request for these rows.

        Raises:
            VocabMappingError: encoding `hidden` without a mapping: the server needs none, but the trainer does.
        """
        if encoding == "hidden" and mapping is None:
            raise VocabMappingError(
                "encoding 'hidden' needs a vocabulary mapping: call set_vocab_mapping first, or use encoding='logits'"
            )
        return SupervisionRequest(
            input_ids=self.layout.pack(self.input_ids).to("cpu"),
            seq_lens=self.layout.seq_lens,
            row_mask=self.row_mask(rows),
            encoding=encoding,
            mapping=mapping,
            probs_dtype=probs_dtype,
        )


def read_trainer_rows(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    vocab_size: int,
    position_ids: torch.Tensor | None = None,
    seq_lens: SeqLens | None = None,
    doc_remaining: torch.Tensor | None = None,
) -> TrainerRows:
    """Check a trainer's `[batch, seq]` tensors and find their sequences.

    A pad never bears loss, whatever `loss_mask` says there. In a packed batch missing `position_ids` and
    `doc_remaining` are derived.

    Raises:
        ContractError: wrong dtypes or shapes, masks that are not 0/1 or have holes, lengths that do not add up, ids
            outside the vocabulary, position ids that do not restart with each sequence.
    """
    _check_rows(input_ids, attention_mask, loss_mask)
    layout = lay_out_rows(attention_mask, seq_lens)
    check_token_ids(layout.pack(input_ids), vocab_size)
    supervised = layout.pack(loss_mask).to("cpu", torch.bool) & ~layout.is_first
    if position_ids is not None:
        _check_shape("position_ids", position_ids, layout)
        _check_position_ids(layout, position_ids)
    lengths: torch.Tensor | None = None
    if seq_lens is not None:
        lengths = seq_lens if isinstance(seq_lens, torch.Tensor) else _pad_lengths(seq_lens)
        position_ids = layout.unpack(layout.position_ids()) if position_ids is None else position_ids
        doc_remaining = layout.unpack(layout.doc_remaining()) if doc_remaining is None else doc_remaining
    if doc_remaining is not None:
        _check_shape("doc_remaining", doc_remaining, layout)
    # Copies: a data loader may fill the same memory again while the answer is on its way.
    return TrainerRows(
        layout=layout,
        input_ids=input_ids.clone(),
        attention_mask=attention_mask.clone(),
        loss_mask=loss_mask.clone(),
        position_ids=None if position_ids is None else position_ids.clone(),
        seq_lens=None if lengths is None else lengths.clone(),
        doc_remaining=None if doc_remaining is None else doc_remaining.clone(),
        supervised=supervised,
    )


def _check_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor, loss_mask: torch.Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
        raise ContractError(
            f"input_ids must be int64 [batch, seq], got {input_ids.dtype} {list(input_ids.shape)}: "
            "use input_ids.long(), and unsqueeze(0) for a single row"
        )
    for name, mask in (("attention_mask", attention_mask), ("loss_mask", loss_mask)):
        if mask.shape != input_ids.shape:
            raise ContractError(
                f"{name} is {list(mask.shape)}, input_ids {list(input_ids.shape)}: both must be [batch, seq]; "
                "documents of a packed row go into seq_lens"
            )
        wrong = ((mask != 0) & (mask != 1)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise ContractError(
                f"{name} has {mask[row, column].item()} at row {row}, position {column}: it must be 0 or 1"
            )


def _check_shape(name: str, tensor: torch.Tensor, layout: RowLayout) -> None:
    if tuple(tensor.shape) != (layout.batch, layout.seq) or tensor.is_floating_point():
        raise ContractError(
            f"{name} must be integers {[layout.batch, layout.seq]}, got {tensor.dtype} {list(tensor.shape)}"
        )


def _check_position_ids(layout: RowLayout, position_ids: torch.Tensor) -> None:
    given, expected = layout.pack(position_ids).to("cpu"), layout.position_ids()
    wrong = (given != expected).nonzero()
    if len(wrong):
        index = int(wrong[0, 0])
        row, column = divmod(int(layout.token_positions[index]), layout.seq)
        raise ContractError(
            f"position_ids has {int(given[index])} at row {row}, position {column}, expected {int(expected[index])}: "
            "it restarts at 0 with every sequence; leave it out, or give the documents through seq_lens"
        )


def _pad_lengths(seq_lens: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(len(row) for row in seq_lens)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in seq_lens], dtype=torch.int64)
