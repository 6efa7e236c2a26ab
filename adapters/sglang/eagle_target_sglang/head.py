"""The target's own head and embeddings, whole again where ranks hold shards of them.

n = rows of hidden states or token ids.
"""

from __future__ import annotations

from typing import Any

import torch

from eagle_target.contract.runner import DraftHead
from eagle_target.errors import AdapterError
from eagle_target_sglang import generations

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
EMBEDDING_ROWS = 8192
# Of logits from the draft's rows against the engine's own, relative to their norm.
DRAFT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Head:
    """SGLang's logits processor and LM head. Every rank of a sharded target calls the same methods together.

    Args:
        processor: SGLang's. lm_head: what the model gives it. vocab_size: without the rows that pad the weight.
    """

    def __init__(self, processor: Any, lm_head: Any, *, vocab_size: int, tp_size: int) -> None:
        self._processor = processor
        self._lm_head = lm_head
        self._vocab_size = vocab_size
        self._tp_size = tp_size

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, hidden]` -> float32 `[n, vocab]`, soft-cap and scale included, without padded columns."""
        if not len(hidden):
            return hidden.new_empty((0, self._vocab_size), dtype=torch.float32)
        return generations.project(self._processor, hidden, self._lm_head)[:, : self._vocab_size]

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        """Rows of the head for `[n]` ids; None where its weight is quantised or it has a bias."""
        weight = getattr(self._lm_head, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dtype not in _PLAIN or weight.dim() != 2:
            return None
        if getattr(self._lm_head, "bias", None) is not None:
            return None
        scale = getattr(self._processor, "logit_scale", None)
        return DraftHead(
            weight=_rows(self._lm_head, token_ids, self._vocab_size, self._tp_size),
            logit_scale=1.0 if scale is None else float(scale),
            soft_cap=getattr(self._processor, "final_logit_softcapping", None) or None,
        )

    def draft_head_agrees(self, hidden: torch.Tensor) -> bool:
        """Whether the draft's rows of the head give the engine's own logits for `[n, hidden]`."""
        ids = torch.arange(min(self._vocab_size, 256), device=hidden.device)
        head = self.draft_head(ids)
        if head is None:
            return False
        own = self.compute_logits(hidden)[:, ids]
        difference = (head.compute_logits(hidden.to(head.weight.dtype)).float() - own).norm()
        return bool(difference <= DRAFT_TOLERANCE[head.weight.dtype] * own.norm().clamp_min(1e-6))


def input_embedding_weight(model: Any, vocab_size: int, tp_size: int) -> torch.Tensor:
    """The input embedding `[vocab, hidden]`: SGLang's own memory, or put together from the ranks' shards.

    Raises:
        AdapterError: the model names no plain input embedding.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype not in _PLAIN:
        raise AdapterError(f"SGLang's {type(model).__name__} has no plain input embedding")
    if _is_whole(embedding, vocab_size, tp_size):
        return weight.detach()[:vocab_size]
    parts = torch.split(torch.arange(vocab_size), EMBEDDING_ROWS)
    return torch.cat([_rows(embedding, part, vocab_size, tp_size) for part in parts])


def _rows(module: Any, token_ids: torch.Tensor, vocab_size: int, tp_size: int) -> torch.Tensor:
    """A copy of a weight's rows for `[n]` ids, as they are: a module may multiply what it looks up, as Gemma's does."""
    weight = module.weight.detach()
    token_ids = token_ids.to(weight.device)
    if _is_whole(module, vocab_size, tp_size):
        return weight.index_select(0, token_ids)  # type: ignore[no-any-return]
    start, end = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
    mine = (token_ids >= start) & (token_ids < end)
    rows = weight.index_select(0, (token_ids - start).clamp(0, len(weight) - 1)) * mine[:, None]
    return generations.all_reduce(rows)


def _is_whole(module: Any, vocab_size: int, tp_size: int) -> bool:
    """Whether each rank has all rows; SGLang does not shard the embedding of every model."""
    shard = getattr(module, "shard_indices", None)
    return tp_size == 1 or shard is None or shard.org_vocab_end_index - shard.org_vocab_start_index >= vocab_size
