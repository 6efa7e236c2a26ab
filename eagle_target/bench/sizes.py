"""Bytes a token: the formula, for models known by their shapes. Counted are real tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from eagle_target.contract.request import aux_bytes, row_bytes
from eagle_target.contract.target import TargetInfo
from eagle_target.verify.workload import DRAFT_VOCAB

if TYPE_CHECKING:
    from eagle_target.contract.request import Encoding

INT64_BYTES = 8
BOOL_BYTES = 1


@dataclass(frozen=True)
class Shape:
    """A model's sizes, bfloat16."""

    model: str
    hidden_size: int
    vocab_size: int
    num_layers: int

    @property
    def info(self) -> TargetInfo:
        """As a target's facts."""
        return TargetInfo(
            model=self.model,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            dtype="bfloat16",
            device="cpu",
            engine="none",
            engine_version="none",
        )


# From each model's config.json.
KNOWN_MODELS = (
    Shape("Llama-3.1-8B", 4096, 128_256, 32),
    Shape("Qwen3-8B", 4096, 151_936, 36),
    Shape("Qwen3-30B-A3B", 2048, 151_936, 48),
    Shape("gpt-oss-20b", 2880, 201_088, 24),
)


def bytes_per_token(
    info: TargetInfo,
    encoding: Encoding,
    *,
    draft_vocab_size: int,
    loss_ratio: float = 1.0,
    probs_dtype: torch.dtype = torch.float32,
) -> float:
    """Bytes of supervision for each real token; pads are not sent.

    Args:
        info: the target. loss_ratio: share of the real tokens whose row of the distribution is asked for.
    """
    row = row_bytes(info, encoding, draft_vocab_size=draft_vocab_size, probs_dtype=probs_dtype)
    return aux_bytes(info) + loss_ratio * row


def reference_bytes_per_token(info: TargetInfo, *, draft_vocab_size: int, pad_ratio: float = 0.0) -> float:
    """The same of NeMo AutoModel's remote target: float32 probabilities of every row, masks and ids, pads as well."""
    a_token = aux_bytes(info) + draft_vocab_size * torch.float32.itemsize + BOOL_BYTES + 2 * INT64_BYTES
    return a_token / (1 - pad_ratio)


@dataclass(frozen=True)
class Sizes:
    """Bytes a token of one model, by way."""

    model: str
    reference: float
    probs_float32: float
    probs_bfloat16: float
    hidden: float


def known_sizes(*, draft_vocab_size: int = DRAFT_VOCAB, loss_ratio: float = 1.0, pad_ratio: float = 0.0) -> list[Sizes]:
    """Bytes a token of every known model."""

    def of(shape: Shape, encoding: Encoding, probs_dtype: torch.dtype = torch.float32) -> float:
        return bytes_per_token(
            shape.info,
            encoding,
            draft_vocab_size=draft_vocab_size,
            loss_ratio=loss_ratio,
            probs_dtype=probs_dtype,
        )

    return [
        Sizes(
            shape.model,
            reference_bytes_per_token(shape.info, draft_vocab_size=draft_vocab_size, pad_ratio=pad_ratio),
            of(shape, "probs"),
            of(shape, "probs", torch.bfloat16),
            of(shape, "hidden"),
        )
        for shape in KNOWN_MODELS
    ]
