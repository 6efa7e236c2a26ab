"""How many bytes an answer takes, known before it is made: a pure function of what is asked and of the target."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch

from eagle_target.projection import Encoding

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eagle_target.info import TargetInfo
    from eagle_target.supervision import SupervisionRequest

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
