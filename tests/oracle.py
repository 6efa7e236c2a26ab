"""What a batch must hold, worked out with loops from full logits. Shares no code with what it checks.

Position t of a row carries what was computed at the token after t in the same sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

FullForward = Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]]


def documents_of_row(mask: Sequence[int], lengths: Sequence[int] | None) -> list[list[int]]:
    """Positions of each document of one row, pads left out."""
    real = [position for position, value in enumerate(mask) if value]
    if lengths is None:
        return [real] if real else []
    documents: list[list[int]] = []
    if sum(lengths) == len(real):
        taken = 0
        for length in lengths:
            documents.append(real[taken : taken + length])
            taken += length
    else:
        assert sum(lengths) == len(mask), "the oracle knows two ways to pack"
        start = 0
        for length in lengths:
            documents.append([position for position in range(start, start + length) if mask[position]])
            start += length
    return [document for document in documents if document]


def softmax_of(logits: Sequence[float]) -> list[float]:
    """Softmax in Python floats."""
    top = max(logits)
    powers = [math.exp(value - top) for value in logits]
    total = sum(powers)
    return [power / total for power in powers]


def logsumexp_of(logits: Sequence[float]) -> float:
    """Log of the softmax denominator in Python floats."""
    top = max(logits)
    return top + math.log(sum(math.exp(value - top) for value in logits))


def oracle_batch(
    forward: FullForward,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    selected_token_ids: Sequence[int],
    seq_lens: Sequence[Sequence[int]] | None = None,
    rows: str = "supervised",
    encoding: str = "probs",
) -> dict[str, torch.Tensor]:
    """Every field of the batch, by name. `forward` maps one sequence's ids to `[n, 3*hidden]` and `[n, vocab]`."""
    batch, seq = input_ids.shape
    aux_width, vocab = (tensor.shape[1] for tensor in forward([0]))
    out = {
        "aux_hidden_states": torch.zeros(batch, seq, aux_width),
        "input_ids": torch.zeros(batch, seq, dtype=torch.int64),
        "attention_mask": attention_mask.clone(),
        "loss_mask": torch.zeros_like(loss_mask),
        "target_top_ids": torch.zeros(batch, seq, dtype=torch.int32),
        "target_logsumexp": torch.zeros(batch, seq),
    }
    if encoding == "logits":
        out["logits"] = torch.zeros(batch, seq, vocab)
    else:
        out["target_probs"] = torch.zeros(batch, seq, len(selected_token_ids))
        out["position_mask"] = torch.zeros(batch, seq, 1, dtype=torch.bool)
    if seq_lens is not None:
        out["position_ids"] = torch.zeros(batch, seq, dtype=torch.int64)
        out["doc_remaining"] = torch.zeros(batch, seq, dtype=torch.int64)
        out["seq_lens"] = torch.zeros(batch, max(len(lengths) for lengths in seq_lens), dtype=torch.int64)
        for row, lengths in enumerate(seq_lens):
            for index, length in enumerate(lengths):
                out["seq_lens"][row, index] = length
    for row in range(batch):
        packing = None if seq_lens is None else list(seq_lens[row])
        for document in documents_of_row(attention_mask[row].tolist(), packing):
            _fill_document(out, row, document, forward, input_ids, loss_mask, list(selected_token_ids), rows)
    return out


def _fill_document(
    out: dict[str, torch.Tensor],
    row: int,
    document: list[int],
    forward: FullForward,
    input_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    selected_token_ids: list[int],
    rows: str,
) -> None:
    ids = [int(input_ids[row, position]) for position in document]
    aux, logits = forward(ids)
    for index, position in enumerate(document):
        out["aux_hidden_states"][row, position] = aux[index].float()
        if "position_ids" in out:
            out["position_ids"][row, position] = index
            out["doc_remaining"][row, position] = len(document) - 1 - index
        if index + 1 == len(document):
            continue
        following = document[index + 1]
        bears_loss = bool(loss_mask[row, following])
        out["input_ids"][row, position] = ids[index + 1]
        out["loss_mask"][row, position] = loss_mask[row, following]
        if not (bears_loss or rows == "all"):
            continue
        values: list[float] = logits[index + 1].double().tolist()
        best = values.index(max(values))
        out["target_top_ids"][row, position] = best
        out["target_logsumexp"][row, position] = logsumexp_of(values)
        if "logits" in out:
            out["logits"][row, position] = torch.tensor(values)
            continue
        out["target_probs"][row, position] = torch.tensor(softmax_of([values[token] for token in selected_token_ids]))
        out["position_mask"][row, position, 0] = bears_loss and best in selected_token_ids


def assert_matches(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], atol: float = 1e-5
) -> None:
    """Whether a batch's fields are the oracle's: floats within `atol`, everything else exactly."""
    assert set(tensors) == set(expected)
    for name, wanted in expected.items():
        made = tensors[name].cpu()
        assert made.shape == wanted.shape, f"{name}: {list(made.shape)}, expected {list(wanted.shape)}"
        if not wanted.is_floating_point() or name == "loss_mask":
            assert made.dtype == wanted.dtype, f"{name}: {made.dtype}, expected {wanted.dtype}"
            assert torch.equal(made, wanted), f"{name} differs at {(made != wanted).nonzero()[:8].tolist()}"
        else:
            worst = float((made.float() - wanted.float()).abs().nan_to_num(torch.inf).max())
            assert worst <= atol, f"{name} is {worst} off, {atol} is allowed"
