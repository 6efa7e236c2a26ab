"""The rows of a head that a client fetches."""

from __future__ import annotations

import math

import pytest
import torch

from eagle_target.contract.runner import DraftHead, TargetRunner
from eagle_target.testing.tiny import EmbeddingRunner

WEIGHT = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.0]])
BIAS = torch.tensor([1.0, 0.0, -1.0])


def loops(hidden: list[list[float]], bias: bool, scale: float, cap: float | None) -> torch.Tensor:
    rows = []
    for vector in hidden:
        row = []
        for weights, offset in zip(WEIGHT.tolist(), BIAS.tolist(), strict=True):
            value = sum(w * h for w, h in zip(weights, vector, strict=True)) + (offset if bias else 0.0)
            value *= scale
            row.append(cap * math.tanh(value / cap) if cap else value)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_logits_are_linear_then_scaled_then_capped(bias: bool, scale: float, cap: float | None) -> None:
    hidden = [[1.0, 1.0], [-2.0, 0.5], [0.0, 0.0]]
    head = DraftHead(weight=WEIGHT, bias=BIAS if bias else None, logit_scale=scale, soft_cap=cap)
    torch.testing.assert_close(head.compute_logits(torch.tensor(hidden)), loops(hidden, bias, scale, cap))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_have_the_heads_dtype(dtype: torch.dtype) -> None:
    head = DraftHead(weight=WEIGHT.to(dtype), logit_scale=2.0, soft_cap=30.0)
    assert head.compute_logits(torch.ones(4, 2, dtype=dtype)).dtype == dtype


def test_no_rows_give_no_logits() -> None:
    assert DraftHead(weight=WEIGHT).compute_logits(torch.empty(0, 2)).shape == (0, 3)


@pytest.mark.parametrize("bias", [None, BIAS])
def test_moving_keeps_everything(bias: torch.Tensor | None) -> None:
    moved = DraftHead(weight=WEIGHT, bias=bias, logit_scale=2.0, soft_cap=3.0).to(torch.device("meta"))
    assert moved.weight.device.type == "meta"
    assert (moved.bias is None) == (bias is None)
    assert moved.bias is None or moved.bias.device.type == "meta"
    assert (moved.logit_scale, moved.soft_cap) == (2.0, 3.0)


def test_embedding_runner_is_a_target_runner() -> None:
    assert isinstance(EmbeddingRunner(), TargetRunner)
