"""Which tensors a request's answer has and where they lie in a block of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.target import TargetInfo
    from eagle_target_vllm.memory import Layout, Slot


def place_supervision(
    layout: Layout, request: SupervisionRequest, info: TargetInfo, logits_dtype: torch.dtype
) -> list[Slot]:
    """Place all tensors of `supervision.store_supervision`."""
    rows = int(request.row_mask.sum())
    dtype = getattr(torch, info.dtype)
    slots = [
        layout.add("aux_hidden_states", (request.tokens, 3 * info.hidden_size), dtype),
    ]
    if request.has_row_facts:
        slots.append(layout.add("target_top_ids", (rows,), torch.int32))
        slots.append(layout.add("target_logsumexp", (rows,), torch.float32))
    if request.encoding == "hidden":
        slots.append(layout.add("last_hidden_states", (rows, info.hidden_size), dtype))
    elif request.encoding == "logits":
        slots.append(layout.add("logits", (rows, info.vocab_size), logits_dtype))
    elif request.mapping is not None:
        slots.append(layout.add("target_probs", (rows, request.mapping.draft_vocab_size), request.probs_dtype))
    return slots


def place_states(layout: Layout, tokens: int, info: TargetInfo) -> list[Slot]:
    """Place the hidden states of a plain forward."""
    dtype = getattr(torch, info.dtype)
    return [
        layout.add("aux_hidden_states", (tokens, 3 * info.hidden_size), dtype),
        layout.add("last_hidden_states", (tokens, info.hidden_size), dtype),
    ]


def describe_request(request: SupervisionRequest, slots: list[Slot] | None) -> dict[str, Any]:
    """A request as plain values for `TargetWorker.begin`; its mapping is known there by its hash."""
    return {
        "lengths": list(request.seq_lens),
        "rows": request.row_mask.cpu().numpy().tobytes(),
        "encoding": request.encoding,
        "has_row_facts": request.has_row_facts,
        "mapping": None if request.mapping is None else request.mapping.sha256,
        "probs_dtype": str(request.probs_dtype).removeprefix("torch."),
        "slots": None if slots is None else [slot.plain() for slot in slots],
    }


def describe_forward(seq_lens: list[int], slots: list[Slot]) -> dict[str, Any]:
    """A plain forward as plain values for `TargetWorker.begin`."""
    return {
        "lengths": seq_lens,
        "rows": bytes(sum(seq_lens)),
        "encoding": "states",
        "has_row_facts": False,
        "mapping": None,
        "probs_dtype": "float32",
        "slots": [slot.plain() for slot in slots],
    }
