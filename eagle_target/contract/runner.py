"""The seam to an engine: what a target runner takes and gives.

tokens = sum(seq_lens); hidden, vocab as in TargetInfo.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from eagle_target.errors import AdapterError

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


class TargetRunner(ABC):
    """A loaded target under one engine. Ragged: padding is a client's affair.

    Called by one thread at a time, unless `concurrent_head` says otherwise. Every method may raise `AdapterError`.
    What is not abstract is a default for engines that need no more.
    """

    @property
    @abstractmethod
    def info(self) -> TargetInfo:
        """Facts about the loaded target."""

    @abstractmethod
    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """Choose the three layers to capture; id `i` is the output of decoder layer `i`."""

    @abstractmethod
    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        """Run `[tokens]` int64 as `len(seq_lens)` sequences, each its own causal context."""

    @abstractmethod
    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        """`[n, hidden]` -> `[n, vocab]` with the engine's own head, soft-cap and scale included."""

    @abstractmethod
    def input_embedding_weight(self) -> torch.Tensor:
        """The input embedding, `[vocab, hidden]`; it may be the model's own memory: whoever hands it on copies it."""

    @abstractmethod
    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        """A copy of the LM head's rows for `[n]` int64 ids; None where the head is nothing so simple."""

    @abstractmethod
    def close(self) -> None:
        """Release the engine. Safe to call twice."""

    @property
    def projects(self) -> bool:
        """Whether `supervise` is asked instead of `forward_eagle3`: where a runner has one of its own."""
        return type(self).supervise is not TargetRunner.supervise

    def supervise(self, requests: Sequence[SupervisionRequest], sinks: Sequence[Sink]) -> dict[str, float]:
        """Answer requests, each into its sink, with the tensors of `compute.supervise.store_supervision`.

        For runners that project where their hidden states are: in the processes of their engine, say.

        What is put into a sink is the sink's from then on: it may be read while the next requests are answered.

        Returns:
            seconds by stage, `forward` and `projection`.
        """
        raise AdapterError(
            f"{type(self).__name__} does not project {len(requests)} requests into {len(sinks)} sinks by itself: "
            "call forward_eagle3"
        )

    @property
    def concurrent_head(self) -> bool:
        """Whether one other thread may be in `compute_logits` while `forward_eagle3` runs."""
        return False

    def token_capacity(self) -> int | None:
        """Tokens one forward may have now; None where that cannot be told. Asked before every forward."""
        return None

    def check_alive(self) -> None:  # noqa: B027 - an engine in this process is there
        """Return at once if the engine's processes are there. Asked while there is no work.

        Raises:
            EngineDead: one of them is gone.
        """

    @property
    def computed_tokens(self) -> int | None:
        """Tokens computed since it was loaded, pads included; None for an engine that does not count them."""
        return None
