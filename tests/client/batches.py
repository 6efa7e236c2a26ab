"""Trainers' rows, and what their batches must be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.testing.comparison import assert_same_batch as assert_same_batch  # noqa: PLC0414
from eagle_target.testing.tiny import EmbeddingRunner
from tests.server.cases import POISON, VOCAB_SIZE, mapping_of

if TYPE_CHECKING:
    from eagle_target.contract.batch import Eagle3TargetBatch
    from eagle_target.contract.vocab_mapping import VocabMapping


def rows_of(seed: int = 0, batch: int = 2, seq: int = 12) -> dict[str, torch.Tensor]:
    """Rows of different lengths, about half of whose tokens bear loss."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, seq + 1, (batch, 1), generator=draw)
    mask = (torch.arange(seq) < lengths).long()
    ids = torch.randint(POISON + 1, VOCAB_SIZE, (batch, seq), generator=draw)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "loss_mask": mask * (torch.rand(batch, seq, generator=draw) < 0.5),
    }


def expected_batch(
    trainer_rows: dict[str, torch.Tensor], /, *, mapping: VocabMapping | None = None, **options: Any
) -> Eagle3TargetBatch:
    """The batch, made without a server."""
    with RunnerEagle3TargetModel(EmbeddingRunner(), **options) as target:
        target.set_vocab_mapping(mapping or mapping_of())
        return target.generate_batch(**trainer_rows)
