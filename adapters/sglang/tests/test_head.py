"""Rows of a weight as they are, whole on each rank or sharded over two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eagle_target_sglang import generations
from eagle_target_sglang.head import Head, input_embedding_weight

VOCAB = 11
SCALE = 4.0
WEIGHT = torch.arange(1.0, 1.0 + 2 * VOCAB).reshape(VOCAB, 2)


class Scaled(torch.nn.Embedding):
    """As SGLang has it for Gemma 3: each rank has all rows, and multiplies what it looks up."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return SCALE * super().forward(ids)


class Sharded(torch.nn.Module):
    """A rank's rows of a weight that is padded, and scaled where it is looked up."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        start, end = 6 * rank, min(6 * rank + 6, VOCAB)
        padding = torch.full((8 - end + start, 2), 9.0)
        self.weight = torch.nn.Parameter(torch.cat([WEIGHT[start:end], padding]))
        self.shard_indices = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=end)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"{len(ids)} rows are looked up, not read")


def model_of(embedding: torch.nn.Module) -> Any:
    return SimpleNamespace(get_input_embeddings=lambda: embedding)


@pytest.fixture(autouse=True)
def own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank gives its share of a sum."""
    monkeypatch.setattr(generations, "all_reduce", lambda tensor: tensor)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_embedding_that_every_rank_has_is_given_without_its_scale(ranks: int) -> None:
    embedding = Scaled(VOCAB + 3, 2, _weight=torch.nn.functional.pad(WEIGHT, (0, 0, 0, 3)))
    assert torch.equal(input_embedding_weight(model_of(embedding), VOCAB, ranks), WEIGHT)


def test_the_ranks_shards_of_an_embedding_add_up_to_its_rows() -> None:
    given = sum(input_embedding_weight(model_of(Sharded(rank)), VOCAB, 2) for rank in range(2))
    assert torch.equal(torch.as_tensor(given), WEIGHT)


def test_the_ranks_shards_of_a_head_add_up_to_its_rows() -> None:
    ids = torch.tensor([9, 0, 6, 5, 10])
    heads = [Head(SimpleNamespace(), Sharded(rank), vocab_size=VOCAB, tp_size=2).draft_head(ids) for rank in range(2)]
    given = sum(head.weight for head in heads if head is not None)
    assert torch.equal(torch.as_tensor(given), WEIGHT[ids])
