"""A target whose supervision lies in memory: what is left of a batch is its way to the trainer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from benchmarks.wire_sides import prepared
from eagle_target.contract.runner import DraftHead, TargetForward, TargetRunner
from eagle_target.contract.target import TargetInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.sinks import Sink


class PreparedRunner(TargetRunner):
    """A target runner whose answers lie in memory.

    Args:
        supervision: of as many tokens as a request has at most.
        with_head: whether to have an LM head, for encoding `hidden`.
        written: whether the answer is written to where the transport wants it, as a projection does, or handed over.
    """

    def __init__(self, supervision: prepared.Supervision, *, with_head: bool = False, written: bool = False) -> None:
        tokens = len(supervision.aux)
        self._supervision = supervision
        self._top_ids = prepared.selected_token_ids()[:tokens].to(torch.int32)
        self._logsumexp = torch.zeros(tokens)
        self._last = torch.zeros(tokens, prepared.HIDDEN, dtype=torch.bfloat16)
        self._with_head = with_head
        self._written = written

    @property
    def info(self) -> TargetInfo:
        """Llama-3.1-8B's sizes."""
        return TargetInfo(
            model="prepared",
            num_layers=prepared.LAYERS,
            hidden_size=prepared.HIDDEN,
            vocab_size=prepared.VOCAB,
            dtype="bfloat16",
            device="cpu",
            engine="prepared",
            engine_version="1",
        )

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """Whatever they are."""

    def supervise(self, requests: Sequence[SupervisionRequest], sinks: Sequence[Sink]) -> dict[str, float]:
        """Give what was prepared."""
        started = time.perf_counter()
        for request, sink in zip(requests, sinks, strict=True):
            for name, rows in self._answer(request).items():
                if self._written:
                    sink.allocate(name, rows.shape, rows.dtype).write(0, rows)
                else:
                    sink.put(name, rows)
        return {"forward": 0.0, "projection": time.perf_counter() - started}

    def _answer(self, request: SupervisionRequest) -> dict[str, torch.Tensor]:
        rows = int(request.row_mask.sum())
        hidden = request.encoding == "hidden"
        distribution = self._last if hidden else self._supervision.probs
        return {
            "aux_hidden_states": self._supervision.aux[: request.tokens],
            "last_hidden_states" if hidden else "target_probs": distribution[:rows],
            "target_top_ids": self._top_ids[:rows],
            "target_logsumexp": self._logsumexp[:rows],
        }

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        """Never asked: the supervision is ready."""
        raise NotImplementedError

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        """Never asked: the supervision is ready."""
        raise NotImplementedError

    def input_embedding_weight(self) -> torch.Tensor:
        """Never asked."""
        raise NotImplementedError

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        """Zeros, where there is a head at all."""
        if not self._with_head:
            return None
        return DraftHead(weight=torch.zeros(len(token_ids), prepared.HIDDEN, dtype=torch.bfloat16))

    def close(self) -> None:
        """Nothing to release."""
