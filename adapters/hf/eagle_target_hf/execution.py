"""Run planned batches through a model, captured outputs written straight into packed tensors.

tokens = sum(seq_lens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from eagle_target.contract.runner import TargetForward
from eagle_target_hf.capture import capture_outputs, copy_spans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target_hf.architecture import Architecture
    from eagle_target_hf.batching import Layout, PlannedBatch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Execution:
    """How one model is run.

    decoder: gives the last hidden states. own_logits: run the whole model and keep its logits.
    layout: how sequences share a batch. dtype: of the hidden states. device: where token ids go.
    """

    architecture: Architecture
    decoder: torch.nn.Module
    own_logits: bool
    layout: Layout
    dtype: torch.dtype
    logits_dtype: torch.dtype
    device: torch.device


def run_batches(
    execution: Execution, input_ids: torch.Tensor, batches: Sequence[PlannedBatch], *, aux_layer_ids: Sequence[int]
) -> TargetForward:
    """Run `[tokens]` int64 ids, batch by batch.

    Gives `aux_hidden_states` `[tokens, len(aux_layer_ids)*hidden]` and `last_hidden_states` `[tokens, hidden]`, and
    `logits` `[tokens, vocab]` where the model's own are kept.
    """
    architecture, tokens = execution.architecture, len(input_ids)
    hidden, vocab = architecture.hidden_size, architecture.vocab_size
    aux = torch.empty(tokens, len(aux_layer_ids) * hidden, dtype=execution.dtype, device=execution.device)
    last = torch.empty(tokens, hidden, dtype=execution.dtype, device=execution.device)
    logits: torch.Tensor | None = None
    if execution.own_logits:
        logits = torch.empty(tokens, vocab, dtype=execution.logits_dtype, device=execution.device)
    modules = [*(architecture.layers[layer] for layer in aux_layer_ids), execution.decoder]
    outputs = [*(aux[:, hidden * i : hidden * (i + 1)] for i in range(len(aux_layer_ids))), last]
    run = execution.decoder if logits is None else architecture.causal_lm
    for batch in batches:
        slots = input_ids[batch.token_index().to(input_ids.device)]
        with capture_outputs(modules, outputs, batch):
            result = run(input_ids=slots, use_cache=False, return_dict=True, **batch.model_inputs(execution.device))
        if logits is not None:
            copy_spans(result.logits.flatten(0, 1)[:, :vocab], logits, batch.spans())
    return TargetForward(aux_hidden_states=aux, last_hidden_states=last, logits=logits)
