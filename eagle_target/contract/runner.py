"""The seam to an engine: what a target runner takes and gives.

tokens = sum(seq_lens); hidden, vocab as in TargetInfo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.sinks import Sink
    from eagle_target.contract.target import TargetInfo


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TargetForward:
    """What one forward over packed tokens gives.

    aux_hidden_states: `[tokens, 3*hidden]`, the captured layers low to high.
    last_hidden_states: `[tokens, hidden]`, after the final norm: what the LM head takes.
    logits: `[tokens, vocab]`, only from a target whose logits are no function of `last_hidden_states`;
        `compute_logits` is then never called.
    """

    aux_hidden_states: torch.Tensor
    last_hidden_states: torch.Tensor
    logits: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DraftHead:
    """Rows of the target's LM head, with all it does to their logits.

    weight: `[n, hidden]`; bias: `[n]` or None.
    logit_scale: factor on the logits. soft_cap: `cap * tanh(logits / cap)` after the scale.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden]` -> `[rows, n]` in the head's dtype."""
        logits = functional.linear(last_hidden_states, self.weight, self.bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits

    def to(self, device: torch.device) -> DraftHead:
        """The same head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return DraftHead(weight=self.weight.to(device), bias=bias, logit_scale=self.logit_scale, soft_cap=self.soft_cap)


@runtime_checkable
class TargetRunner(Protocol):
    """A loaded target under one engine. Ragged: padding is a client's affair.

    Called by one thread at a time, unless it is a `ConcurrentHeadRunner`. Every method may raise `AdapterError`.
    """

    @property
    def info(self) -> TargetInfo:
        """Facts about the loaded target."""
        ...

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """Choose the three layers to capture; id `i` is the output of decoder layer `i`."""
        ...

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        """Run `[tokens]` int64 as `len(seq_lens)` sequences, each its own causal context."""
        ...

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        """`[n, hidden]` -> `[n, vocab]` with the engine's own head, soft-cap and scale included."""
        ...

    def input_embedding_weight(self) -> torch.Tensor:
        """The input embedding, `[vocab, hidden]`; it may be the model's own memory: whoever hands it on copies it."""
        ...

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        """A copy of the LM head's rows for `[n]` int64 ids; None where the head is nothing so simple."""
        ...

    def close(self) -> None:
        """Release the engine. Safe to call twice."""
        ...


@runtime_checkable
class SupervisingRunner(TargetRunner, Protocol):
    """A runner that projects, too, where its hidden states are: in the processes of its engine, say."""

    def supervise(self, requests: Sequence[SupervisionRequest], sinks: Sequence[Sink]) -> dict[str, float]:
        """Answer requests, each into its sink, with the tensors of `supervision.store_supervision`.

        What is put into a sink is the sink's from then on: it may be read while the next requests are answered.

        Returns:
            seconds by stage, `forward` and `projection`.
        """
        ...


@runtime_checkable
class ConcurrentHeadRunner(Protocol):
    """What a runner has that can project one forward while it runs the next."""

    @property
    def concurrent_head(self) -> bool:
        """Whether one other thread may be in `compute_logits` while `forward_eagle3` runs."""
        ...


@runtime_checkable
class CapacityRunner(Protocol):
    """What a runner has that knows how much fits its engine's memory."""

    def token_capacity(self) -> int | None:
        """Tokens one forward may have now; None where that cannot be told. Asked before every forward."""
        ...


@runtime_checkable
class WatchedRunner(Protocol):
    """What a runner has whose engine runs in other processes: they may end while nobody asks for anything."""

    def check_alive(self) -> None:
        """Return at once if the engine's processes are there. Asked while there is no work.

        Raises:
            EngineDead: one of them is gone.
        """
        ...


@runtime_checkable
class PaddingRunner(Protocol):
    """What a runner has that pads."""

    @property
    def computed_tokens(self) -> int:
        """Tokens computed since it was loaded, pads included."""
        ...
