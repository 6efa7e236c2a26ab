"""Rows of vLLM's embedding and LM head, which tensor parallelism spreads over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

if TYPE_CHECKING:
    from collections.abc import Callable

PROBE_ROWS = 4


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This rank's rows of one `[vocab, hidden]` weight."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    start: int
    end: int

    def fill(self, token_ids: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Write this rank's share of the rows `[n]` of ids to `[n, hidden]` and `[n]`."""
        mine = ((token_ids >= self.start) & (token_ids < self.end)).nonzero()[:, 0]
        local = (token_ids[mine] - self.start).to(self.weight.device)
        weight[mine] = self.weight.detach().index_select(0, local).to(weight.device)
        if bias is not None and self.bias is not None:
            bias[mine] = self.bias.detach().index_select(0, local).to(bias.device)


@dataclass(frozen=True, slots=True)
class HeadForm:
    """A head whose logits are `hidden @ weight.T + bias`, scaled and capped; see `DraftHead`."""

    shard: VocabShard
    logit_scale: float
    soft_cap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, hidden]` -> this rank's `[n, end - start]`."""
        rows = self.shard.end - self.shard.start
        bias = None if self.shard.bias is None else self.shard.bias[:rows]
        logits = torch.nn.functional.linear(hidden, self.shard.weight[:rows], bias) * self.logit_scale
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap


def find_embedding(model: torch.nn.Module, hidden_size: int) -> VocabShard | None:
    """This rank's share of the input embedding; None where its weight is not plain."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            return _shard(module, hidden_size)
    # A tied head can be the embedding itself.
    head = _find_head(model)
    return None if head is None else _shard(head, hidden_size)


def find_final_norm(model: Any) -> torch.nn.Module | None:
    """The norm between the last decoder layer and the LM head; None where the model keeps it elsewhere."""
    language_model: Any = model.get_language_model() if hasattr(model, "get_language_model") else model
    norm: Any = getattr(getattr(language_model, "model", language_model), "norm", None)
    return norm if isinstance(norm, torch.nn.Module) else None


def find_head_form(
    model: torch.nn.Module, hidden_size: int, dtype: torch.dtype, compute_logits: Callable[[torch.Tensor], Any]
) -> HeadForm | None:
    """What the LM head does, where that is proven on a few rows; called by all ranks, known by the first."""
    probe = torch.randn(PROBE_ROWS, hidden_size, generator=torch.Generator().manual_seed(0))
    head, processor = _find_head(model), _find_logits_processor(model)
    device = next(model.parameters()).device
    hidden = probe.to(device, dtype)
    expected = compute_logits(hidden)
    shard = None if head is None else _shard(head, hidden_size)
    if shard is None or processor is None or shard.weight.dtype != dtype:
        return None
    # vLLM caps before it scales; a DraftHead scales first.
    scale, cap = float(processor.scale), processor.soft_cap
    form = HeadForm(shard, scale, None if not cap else float(cap) * scale)
    if expected is None:
        return form
    wanted = expected[:, shard.start : shard.end].float()
    error = (form.logits(hidden).float() - wanted).norm()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    return form if float(error) <= tolerance * max(float(wanted.norm()), 1e-6) else None


def _find_head(model: torch.nn.Module) -> Any:
    kinds: tuple[type[Any], ...] = (ParallelLMHead, VocabParallelEmbedding)
    return next((module for kind in kinds for module in model.modules() if isinstance(module, kind)), None)


def _find_logits_processor(model: torch.nn.Module) -> Any:
    return next((module for module in model.modules() if type(module).__name__ == "LogitsProcessor"), None)


def _shard(module: Any, hidden_size: int) -> VocabShard | None:
    weight: Any = getattr(module, "weight", None)
    indices = module.shard_indices
    start, end = indices.org_vocab_start_index, indices.org_vocab_end_index
    plain = (
        isinstance(weight, torch.Tensor)
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and weight.dim() == 2
        and weight.shape[1] == hidden_size
        and len(weight) >= end - start
    )
    return VocabShard(weight, getattr(module, "bias", None), start, end) if plain else None
