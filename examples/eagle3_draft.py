"""The EAGLE-3 draft model, and its loss with training-time test: all of it, in plain torch.

batch, seq as in `Eagle3TargetBatch`; H = hidden, V = the draft vocabulary, D = depths of training-time test.

A draft proposes D tokens in a row, so it has to work from its own hidden states, not only from the target's.
Training-time test unrolls that: depth 0 starts from the target's hidden states, depth k from the draft's at depth
k-1, with ids and supervision shifted left by one each time. Slot t is thus one chain: at depth k it has read the
tokens up to t+1+k and predicts what the target would say next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from eagle_target import Eagle3TargetBatch

DEPTH_DECAY = 0.8

# Keys and values [batch, heads, seq, head_dim] of each depth so far.
Cache = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftConfig:
    """Sizes of a draft. `hidden_size` is the target's; `draft_vocab_size` that of the vocabulary mapping."""

    hidden_size: int
    draft_vocab_size: int
    intermediate_size: int
    head_dim: int = 32
    rope_theta: float = 10000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Unrolled:
    """What one unroll over a batch gave.

    loss: soft cross-entropy, weighted over the depths.
    hits, supervised: `[D]` slots where draft and target agree on the top token, out of those that bear loss.
    alive, chains: `[D]` slots where they agreed at this depth and every earlier one, out of those in the text that
        far. A token outside the draft vocabulary ends its chain: the draft cannot propose it.
    """

    loss: torch.Tensor
    hits: torch.Tensor
    supervised: torch.Tensor
    alive: torch.Tensor
    chains: torch.Tensor


class Draft(Protocol):
    """What `unroll` needs of a draft; see `Eagle3Draft`."""

    def fuse(self, aux_hidden_states: torch.Tensor) -> torch.Tensor:
        """The state a chain starts from."""
        ...

    def __call__(
        self, input_ids: torch.Tensor, hidden: torch.Tensor, attention_mask: torch.Tensor, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One depth: the next state and the logits."""
        ...


class Eagle3Draft(nn.Module):
    """One decoder layer over the target's hidden states and the embedding of the next token.

    Args:
        config: sizes. target_embedding: `[vocab, H]`, the target's own; it stays as it is.
    """

    embedding: torch.Tensor

    def __init__(self, config: DraftConfig, target_embedding: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("embedding", target_embedding.detach().clone())
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = DraftLayer(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)

    def fuse(self, aux_hidden_states: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, 3H]` of three target layers -> `[batch, seq, H]`, the state a chain starts from."""
        fused: torch.Tensor = self.fc(aux_hidden_states.to(self.fc.weight.dtype))
        return fused

    def forward(
        self, input_ids: torch.Tensor, hidden: torch.Tensor, attention_mask: torch.Tensor, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One depth: ids and state in, `[batch, seq, H]` state and `[batch, seq, V]` logits out; extends the cache."""
        embedded = functional.embedding(input_ids, self.embedding).to(hidden.dtype)
        hidden = self.layer(embedded, hidden, attention_mask, cache)
        return hidden, self.lm_head(self.norm(hidden))


class DraftLayer(nn.Module):
    """A Llama decoder layer whose attention reads the embedding beside the state."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.embedding_norm = nn.RMSNorm(size, eps=1e-6)
        self.hidden_norm = nn.RMSNorm(size, eps=1e-6)
        self.attention = DraftAttention(config)
        self.mlp_norm = nn.RMSNorm(size, eps=1e-6)
        self.gate = nn.Linear(size, inner, bias=False)
        self.up = nn.Linear(size, inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(
        self, embedded: torch.Tensor, hidden: torch.Tensor, attention_mask: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """`[batch, seq, H]` twice -> `[batch, seq, H]`."""
        both = torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.attention(both, attention_mask, cache)
        normed = self.mlp_norm(hidden)
        mlp: torch.Tensor = self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return hidden + mlp


class DraftAttention(nn.Module):
    """Attention of depth k: causal over the keys of depth 0, plus one key of each later depth at the same slot.

    Those are the tokens a real chain would have read: the text up to slot t, then its own k proposals.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.qkv = nn.Linear(2 * config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, both: torch.Tensor, attention_mask: torch.Tensor, cache: Cache) -> torch.Tensor:
        """`[batch, seq, 2H]` -> `[batch, seq, H]`; appends this depth's keys and values to the cache."""
        batch, seq, _ = both.shape
        heads = self.qkv(both).view(batch, seq, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        cos, sin = self._rotation(seq, offset=len(cache), device=both.device)
        query, key, value = _rotate(heads[0], cos, sin), _rotate(heads[1], cos, sin), heads[2]
        cache.append((key, value))

        (first_keys, first_values), later = cache[0], cache[1:]
        query = query * self.head_dim**-0.5
        scores = [(query @ first_keys.mT).masked_fill(~_visible(attention_mask), torch.finfo(query.dtype).min)]
        scores += [(query * keys).sum(dim=-1, keepdim=True) for keys, _ in later]
        weights = torch.cat(scores, dim=-1).softmax(dim=-1)
        mixed = weights[..., :seq] @ first_values
        for depth, (_, values) in enumerate(later):
            mixed = mixed + weights[..., seq + depth, None] * values
        attended: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, seq, -1))
        return attended

    def _rotation(self, seq: int, *, offset: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE's cosine and sine `[seq, head_dim]`; depth k is k tokens further on."""
        steps = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        angles = torch.arange(offset, offset + seq, device=device)[:, None] * self.rope_theta**-steps
        return torch.cat([angles, angles], dim=-1).cos(), torch.cat([angles, angles], dim=-1).sin()


def unroll(draft: Draft, batch: Eagle3TargetBatch, depths: int) -> Unrolled:
    """Run training-time test over padded (not packed) rows, and compare with the target at every depth.

    Raises:
        ValueError: the batch carries full-vocabulary logits; ask the target for encoding `probs` or `hidden`.
    """
    if batch.target_probs is None or batch.position_mask is None:
        raise ValueError("this trainer needs target_probs: set a vocabulary mapping, with encoding 'probs' or 'hidden'")
    ids, probs = batch.input_ids, batch.target_probs
    bears_loss, in_text = batch.position_mask, batch.loss_mask.bool()
    hidden, cache = draft.fuse(batch.aux_hidden_states), Cache()
    alive = chain = torch.ones_like(in_text)
    losses, counts = [], []
    for _ in range(depths):
        hidden, logits = draft(ids, hidden, batch.attention_mask, cache)
        losses.append(soft_cross_entropy(logits, probs, bears_loss))
        hit = (logits.argmax(dim=-1) == probs.argmax(dim=-1)) & bears_loss[..., 0]
        alive, chain = alive & hit, chain & in_text
        counts.append(torch.stack([mask.sum() for mask in (hit, bears_loss, alive, chain)]))
        ids, probs, bears_loss, in_text = (_shift_left(tensor) for tensor in (ids, probs, bears_loss, in_text))
    weights = torch.tensor([DEPTH_DECAY**depth for depth in range(depths)], device=hidden.device)
    hits, supervised, alive_count, chains = torch.stack(counts, dim=1)
    loss = (torch.stack(losses) * weights).sum() / weights.sum()
    return Unrolled(loss=loss, hits=hits, supervised=supervised, alive=alive_count, chains=chains)


def soft_cross_entropy(logits: torch.Tensor, target_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the slots in `[batch, seq, 1]` mask of the cross-entropy to `[batch, seq, V]` probabilities."""
    per_slot = -(target_probs.float() * logits.float().log_softmax(dim=-1)).sum(dim=-1)
    return (per_slot * mask[..., 0]).sum() / mask.sum().clamp(min=1)


def accept_length(alive: torch.Tensor, chains: torch.Tensor) -> float:
    """Tokens a greedy round of speculative decoding yields on average, from `[D]` counts of `Unrolled`.

    One comes from the target itself, and one more for every depth that a chain survives.
    """
    return 1.0 + float((alive / chains.clamp(min=1)).sum())


def _visible(attention_mask: torch.Tensor) -> torch.Tensor:
    """Bool `[batch, 1, seq, seq]`: key not after the query, and no pad."""
    seq = attention_mask.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=attention_mask.device).tril()
    return causal & attention_mask.bool()[:, None, None, :]


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = states.chunk(2, dim=-1)
    return states * cos.to(states.dtype) + torch.cat([-high, low], dim=-1) * sin.to(states.dtype)


def _shift_left(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[:, 1:], torch.zeros_like(tensor[:, :1])], dim=1)
