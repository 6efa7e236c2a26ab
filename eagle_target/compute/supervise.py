"""From a ragged request to ragged supervision: what a server does for a client.

tokens = sum(seq_lens); rows = the rows of the distribution that were asked for.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from eagle_target.compute.projection import project_full
from eagle_target.contract.request import answer_spec, forward_spec
from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.compute.projection import ComputeLogits
    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.runner import TargetForward, TargetRunner
    from eagle_target.contract.sinks import Sink
    from eagle_target.contract.target import TargetInfo


def compute_supervision(runner: TargetRunner, request: SupervisionRequest, sink: Sink) -> None:
    """Run the target on one request and put the supervision, the tensors of its `answer_spec`, into a sink."""
    device = torch.device(runner.info.device)
    # A trainer's autocast must not reach the target: the supervision would differ from a server's.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if runner.projects:
            runner.supervise([request], [sink])
            return
        forward = runner.forward_eagle3(request.input_ids.to(device), request.seq_lens)
        check_forward(forward, request.tokens, runner.info)
        store_supervision(runner, request, forward, sink)


def store_supervision(runner: TargetRunner, request: SupervisionRequest, forward: TargetForward, sink: Sink) -> None:
    """Project one request's part of a forward and put the supervision into a sink."""
    spec = answer_spec(request, runner.info)
    sink.put("aux_hidden_states", forward.aux_hidden_states)
    rows = request.row_mask.to(forward.last_hidden_states.device).nonzero()[:, 0]
    hidden = forward.last_hidden_states.index_select(0, rows)
    if "last_hidden_states" in spec:
        sink.put("last_hidden_states", hidden)
    if not request.has_row_facts:
        return
    compute_logits: ComputeLogits = runner.compute_logits
    if forward.logits is not None:
        # The tiles are then tiles of row numbers: the target's own logits are looked up, not computed.
        compute_logits, hidden = partial(_look_up, forward.logits), rows[:, None]
    project_full(
        hidden,
        compute_logits,
        vocab_size=runner.info.vocab_size,
        spec=spec,
        mapping=None if request.mapping is None else request.mapping.to(hidden.device),
        sink=sink,
    )


def split_forward(forward: TargetForward, token_counts: Sequence[int]) -> list[TargetForward]:
    """Cut one forward over several requests' tokens into a forward each; views, no copies."""
    counts = list(token_counts)
    aux = torch.split(forward.aux_hidden_states, counts)
    last = torch.split(forward.last_hidden_states, counts)
    logits: Sequence[torch.Tensor | None] = (
        [None] * len(aux) if forward.logits is None else torch.split(forward.logits, counts)
    )
    return [
        type(forward)(aux_hidden_states=a, last_hidden_states=h, logits=v)
        for a, h, v in zip(aux, last, logits, strict=True)
    ]


def check_forward(forward: TargetForward, tokens: int, info: TargetInfo) -> None:
    """Refuse a runner's output of the wrong shape, before it is trained on.

    Raises:
        ContractError: names the tensor, its shape and the expected one.
    """
    expected = {name: spec.shape for name, spec in forward_spec(tokens, info).items()}
    expected["logits"] = (tokens, info.vocab_size)
    for name, shape in expected.items():
        tensor: torch.Tensor | None = getattr(forward, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ContractError(
                f"engine {info.engine} {info.engine_version} gave {name} {list(tensor.shape)}, expected {list(shape)}"
            )


def _look_up(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return logits.index_select(0, rows[:, 0])
