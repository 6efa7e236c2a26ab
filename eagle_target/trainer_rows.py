"""From a trainer's rows to a ragged request: checked, and its sequences found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch

from eagle_target.errors import ContractError, VocabMappingError
from eagle_target.projection import RowPolicy
from eagle_target.sequences import RowLayout, lay_out_rows
from eagle_target.supervision import SupervisionRequest, check_token_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.projection import Encoding
    from eagle_target.sequences import SeqLens
    from eagle_target.vocabulary import VocabMapping


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
