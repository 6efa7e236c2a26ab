"""The batch that both sides carry: the same seed gives the same bytes in every process. torch only."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENS = 2048
HIDDEN = 4096
VOCAB = 128_256
DRAFT_VOCAB = 32_000
LAYERS = 32


class Supervision(NamedTuple):
    """aux bf16 `[tokens, 3*hidden]`, probs float32 `[tokens, draft_vocab]`; row t of probs belongs to position t."""

    aux: torch.Tensor
    probs: torch.Tensor


def make_supervision(tokens: int = TOKENS) -> Supervision:
    """Random supervision of Llama-3.1-8B's sizes."""
    draw = torch.Generator().manual_seed(0)
    aux = torch.empty(tokens, 3 * HIDDEN, dtype=torch.bfloat16).normal_(generator=draw)
    probs = torch.empty(tokens, DRAFT_VOCAB).exponential_(generator=draw)
    probs /= probs.sum(1, keepdim=True)
    return Supervision(aux, probs)


def make_trainer_inputs(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask, loss_mask int64 `[1, tokens]`: one full sequence, all of it supervised."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (1, tokens), generator=draw)
    ones = torch.ones(1, tokens, dtype=torch.int64)
    return ids, ones, ones.clone()


def selected_token_ids() -> torch.Tensor:
    """int64 `[draft_vocab]` in an order of their own."""
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))[:DRAFT_VOCAB].clone()


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """SHA-256 of tensors' bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def supervision_digest(aux: torch.Tensor, probs: torch.Tensor) -> str:
    """Digest of what both sides carry: the last position predicts nothing, so its row of probs is left out."""
    return digest([aux.view(TOKENS, -1), probs.view(TOKENS, -1)[:-1]])
