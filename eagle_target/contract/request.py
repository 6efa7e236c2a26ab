"""What is asked of a target, and which tensors answer it: pure functions of the request and the target.

tokens = sum(seq_lens); rows = the rows of the distribution that were asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from eagle_target.errors import ContractError, VocabMappingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from eagle_target.contract.target import TargetInfo
    from eagle_target.contract.vocab_mapping import VocabMapping


Encoding = Literal["probs", "hidden", "logits"]
RowPolicy = Literal["supervised", "all"]
PROBS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Axis = Literal["tokens", "rows"]
LOGITS_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
        """Whether `target_top_ids` and `target_logsumexp` are in the answer."""
        return self.mapping is None or _has_row_facts(
            self.encoding, self.mapping.draft_vocab_size, self.mapping.vocab_size
        )

    def check(self, info: TargetInfo) -> None:
        """Refuse what the target cannot do: where a server takes a request from outside.

        Raises:
            ContractError: dtypes, shapes, lengths, ids or the encoding are wrong.
            VocabMappingError: the mapping is missing or for another vocabulary.
        """
        self.check_but_ids(info)
        check_token_ids(self.input_ids, info.vocab_size)

    def check_but_ids(self, info: TargetInfo) -> None:
        """Refuse the same but for ids outside the vocabulary: where the trainer's rows were checked for them.

        Raises:
            ContractError, VocabMappingError: as for `check`.
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
    """Refuse ids outside the vocabulary: an engine would read past its embedding.

    Called once a trust boundary: of the trainer's rows (`compute.layout.read_trainer_rows`), and of a request that a
    server takes from outside (`SupervisionRequest.check`). Nothing in between looks at the ids again.

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


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of an answer.

    axis: what the first dimension counts. shape: `[tokens, ...]` or `[rows, ...]`.
    dtype: that of the elements; where `is_widest`, the widest that they may have.
    """

    axis: Axis
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_widest: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; where `is_widest`, the most that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def fits(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether a tensor of this shape and dtype is the one that is meant."""
        return tuple(shape) == self.shape and self.fits_dtype(dtype)

    def fits_dtype(self, dtype: torch.dtype) -> bool:
        """Whether elements of this dtype are those that are meant."""
        if self.is_widest:
            return dtype in LOGITS_DTYPES and dtype.itemsize <= self.dtype.itemsize
        return dtype == self.dtype

    def __str__(self) -> str:
        return f"{list(self.shape)} of {self.dtype}{' or narrower' if self.is_widest else ''}"


def answer_spec(
    request: SupervisionRequest, info: TargetInfo, *, logits_dtype: torch.dtype | None = None
) -> dict[str, TensorSpec]:
    """The tensors that answer a request, by name. All that counts, allocates, checks or places them goes by it.

    logits_dtype: the head's own, for an engine that takes memory before it runs the head. The target's facts do not
        tell it; without it `logits` are float32, or the target's dtype where that is wider, or narrower.
    """
    return _tensors_of(
        info,
        request.encoding,
        tokens=request.tokens,
        rows=int(request.row_mask.count_nonzero()),
        draft_vocab_size=None if request.mapping is None else request.mapping.draft_vocab_size,
        probs_dtype=request.probs_dtype,
        logits_dtype=logits_dtype,
    )


def forward_spec(tokens: int, info: TargetInfo) -> dict[str, TensorSpec]:
    """The hidden states that one forward gives, by their names in `TargetForward`."""
    # A trainer that has the whole vocabulary is sent nothing but hidden states.
    return _tensors_of(info, "hidden", tokens=tokens, rows=tokens, draft_vocab_size=info.vocab_size)


def answer_bytes(request: SupervisionRequest, info: TargetInfo) -> int:
    """Bytes of a request's tensors; with encoding `logits` the most that they take."""
    return sum(spec.nbytes for spec in answer_spec(request, info).values())


def aux_bytes(info: TargetInfo) -> int:
    """Bytes a token of `aux_hidden_states`."""
    return _bytes_along("tokens", _tensors_of(info, "probs", tokens=1, rows=1))


def row_bytes(
    info: TargetInfo, encoding: Encoding, *, draft_vocab_size: int, probs_dtype: torch.dtype = torch.float32
) -> int:
    """Bytes of one row of the distribution in an encoding, argmax and logsumexp included where they are sent."""
    spec = _tensors_of(info, encoding, tokens=1, rows=1, draft_vocab_size=draft_vocab_size, probs_dtype=probs_dtype)
    return _bytes_along("rows", spec)


def bytes_per_token(info: TargetInfo, encodings: Iterable[str], draft_vocab_size: int | None) -> dict[str, int]:
    """Bytes of a token that bears loss, by encoding; `probs` in float32, where the draft vocabulary is known."""
    sizes: dict[str, int] = {}
    for encoding in get_args(Encoding):
        if encoding in encodings and (encoding != "probs" or draft_vocab_size is not None):
            sizes[encoding] = aux_bytes(info) + row_bytes(info, encoding, draft_vocab_size=draft_vocab_size or 0)
    return sizes


def _tensors_of(
    info: TargetInfo,
    encoding: Encoding,
    *,
    tokens: int,
    rows: int,
    draft_vocab_size: int | None = None,
    probs_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
) -> dict[str, TensorSpec]:
    """The tensors of an answer: the one place where their shapes and dtypes stand."""
    model: torch.dtype = getattr(torch, info.dtype)

    def of_rows(*width: int, dtype: torch.dtype, is_widest: bool = False) -> TensorSpec:
        return TensorSpec(axis="rows", shape=(rows, *width), dtype=dtype, is_widest=is_widest)

    spec = {"aux_hidden_states": TensorSpec(axis="tokens", shape=(tokens, 3 * info.hidden_size), dtype=model)}
    if _has_row_facts(encoding, draft_vocab_size, info.vocab_size):
        spec["target_top_ids"] = of_rows(dtype=torch.int32)
        spec["target_logsumexp"] = of_rows(dtype=torch.float32)
    if encoding == "hidden":
        spec["last_hidden_states"] = of_rows(info.hidden_size, dtype=model)
    elif encoding == "logits":
        widest = max(torch.float32, model, key=lambda dtype: dtype.itemsize)
        spec["logits"] = of_rows(info.vocab_size, dtype=logits_dtype or widest, is_widest=logits_dtype is None)
    elif draft_vocab_size is not None:
        spec["target_probs"] = of_rows(draft_vocab_size, dtype=probs_dtype)
    return spec


def _has_row_facts(encoding: Encoding, draft_vocab_size: int | None, vocab_size: int) -> bool:
    """Whether the argmax and the logsumexp are sent.

    Not where the trainer projects the whole vocabulary by itself: it has both, and the target projects nothing.
    """
    return encoding != "hidden" or draft_vocab_size != vocab_size


def _bytes_along(axis: Axis, spec: dict[str, TensorSpec]) -> int:
    return sum(each.nbytes for each in spec.values() if each.axis == axis)
