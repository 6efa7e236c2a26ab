"""What is asked of a target, and how many bytes the answer takes: pure functions of the request and the target.

tokens = sum(seq_lens); rows = the rows of the distribution that were asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from eagle_target.errors import ContractError, VocabMappingError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eagle_target.contract.target import TargetInfo
    from eagle_target.contract.vocab_mapping import VocabMapping


Encoding = Literal["probs", "hidden", "logits"]
RowPolicy = Literal["supervised", "all"]
PROBS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SupervisionRequest:
    """One ragged request, a pure function's input.

    input_ids: int64 `[tokens]`. seq_lens: tokens of each sequence.
    row_mask: bool `[tokens]`; row s, the prediction made at token s, is projected where it is set.
    mapping: needed for encoding `probs`. probs_dtype: float32, bfloat16 or float16.
    """

    input_ids: torch.Tensor
    seq_lens: tuple[int, ...]
    row_mask: torch.Tensor
    encoding: Encoding = "probs"
    mapping: VocabMapping | None = None
    probs_dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return self.input_ids.numel()

    @property
    def has_row_facts(self) -> bool:
        """Whether `target_top_ids` and `target_logsumexp` are in the answer.

        Not where the trainer projects the whole vocabulary by itself: it has both, and the target projects nothing.
        """
        return self.encoding != "hidden" or self.mapping is None or not self.mapping.is_whole

    def check(self, info: TargetInfo) -> None:
        """Refuse what the target cannot do.

        Raises:
            ContractError: dtypes, shapes, lengths, ids or the encoding are wrong.
            VocabMappingError: the mapping is missing or for another vocabulary.
        """
        _check_packed("input_ids", self.input_ids, torch.int64, self.tokens)
        _check_packed("row_mask", self.row_mask, torch.bool, self.tokens)
        if not self.seq_lens or min(self.seq_lens) < 1 or sum(self.seq_lens) != self.tokens:
            raise ContractError(
                f"seq_lens must be positive and add up to the {self.tokens} tokens of input_ids, "
                f"got {len(self.seq_lens)} lengths that add up to {sum(self.seq_lens)}"
            )
        if info.max_seq_len is not None and max(self.seq_lens) > info.max_seq_len:
            raise ContractError(
                f"a sequence has {max(self.seq_lens)} tokens, the target takes {info.max_seq_len}: truncate it, or "
                "serve the target with a longer context"
            )
        check_token_ids(self.input_ids, info.vocab_size)
        self._check_encoding(info)

    def _check_encoding(self, info: TargetInfo) -> None:
        if self.encoding not in get_args(Encoding):
            raise ContractError(f"encoding must be one of {get_args(Encoding)}, got {self.encoding!r}")
        if self.probs_dtype not in PROBS_DTYPES:
            raise ContractError(f"probs_dtype must be float32, bfloat16 or float16, got {self.probs_dtype}")
        if self.mapping is not None:
            self.mapping.check_target(info.vocab_size)
        elif self.encoding == "probs":
            raise VocabMappingError(
                "encoding 'probs' needs a vocabulary mapping: call set_vocab_mapping first, or use encoding='logits'"
            )


def check_token_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        ContractError: names the id, its index and the range.
    """
    wrong = ((input_ids < 0) | (input_ids >= vocab_size)).nonzero()
    if len(wrong):
        index = int(wrong[0, 0])
        raise ContractError(
            f"input_ids has {int(input_ids[index])} at token {index}, the target's ids are 0 to {vocab_size - 1}: "
            "use the target's own tokenizer"
        )


def _check_packed(name: str, tensor: torch.Tensor, dtype: torch.dtype, tokens: int) -> None:
    if tensor.dim() != 1 or tensor.dtype != dtype or len(tensor) != tokens or not tokens:
        raise ContractError(
            f"{name} must be a non-empty vector of {dtype} with {tokens} elements, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )


# int32 of the argmax and float32 of the logsumexp.
ROW_FACTS_BYTES = 8


def answer_bytes(request: SupervisionRequest, info: TargetInfo) -> int:
    """Bytes of a request's tensors; with encoding `logits` at most that many, see `row_bytes`."""
    draft_vocab_size = 0 if request.mapping is None else request.mapping.draft_vocab_size
    rows = int(request.row_mask.count_nonzero())
    a_row = row_bytes(info, request.encoding, draft_vocab_size=draft_vocab_size, probs_dtype=request.probs_dtype)
    return request.tokens * aux_bytes(info) + rows * a_row


def aux_bytes(info: TargetInfo) -> int:
    """Bytes a token of `aux_hidden_states`."""
    return 3 * info.hidden_size * _itemsize(info)


def row_bytes(
    info: TargetInfo, encoding: Encoding, *, draft_vocab_size: int, probs_dtype: torch.dtype = torch.float32
) -> int:
    """Bytes of one row of the distribution in an encoding, argmax and logsumexp included where they are sent.

    Logits are counted as float32, which no head of half precision exceeds.
    """
    if encoding == "probs":
        return ROW_FACTS_BYTES + draft_vocab_size * probs_dtype.itemsize
    if encoding == "hidden":
        # Who projects the whole vocabulary takes both facts from that.
        facts = 0 if draft_vocab_size == info.vocab_size else ROW_FACTS_BYTES
        return facts + info.hidden_size * _itemsize(info)
    return ROW_FACTS_BYTES + info.vocab_size * max(torch.float32.itemsize, _itemsize(info))


def bytes_per_token(info: TargetInfo, encodings: Iterable[str], draft_vocab_size: int | None) -> dict[str, int]:
    """Bytes of a token that bears loss, by encoding; `probs` in float32, where the draft vocabulary is known."""
    sizes: dict[str, int] = {}
    for encoding in get_args(Encoding):
        if encoding in encodings and (encoding != "probs" or draft_vocab_size is not None):
            sizes[encoding] = aux_bytes(info) + row_bytes(info, encoding, draft_vocab_size=draft_vocab_size or 0)
    return sizes


def _itemsize(info: TargetInfo) -> int:
    dtype: torch.dtype = getattr(torch, info.dtype)
    return dtype.itemsize
