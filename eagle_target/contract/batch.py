"""The batch a trainer gets. [batch, seq, ...]; position t is aligned as the field says."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Eagle3TargetBatch:
    """Supervision for one batch, in exactly one of two forms.

    aux_hidden_states: `[batch, seq, 3*hidden]`, of position t.
    input_ids, loss_mask: `[batch, seq]`, shifted left by one within each sequence, zero tail.
    attention_mask: `[batch, seq]`, of position t.
    target_probs: `[batch, seq, draft_vocab]` and position_mask: bool `[batch, seq, 1]`, of position t+1; or
    logits: `[batch, seq, vocab]`, of position t+1.
    target_top_ids: int32 `[batch, seq]` and target_logsumexp: float32 `[batch, seq]`, of position t+1.
    position_ids, seq_lens, doc_remaining: packing only, of position t.

    Rows that were not asked for, and pads, are zero.

    Raises:
        ContractError: both forms given, or neither.
    """

    aux_hidden_states: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor
    logits: torch.Tensor | None = None
    target_probs: torch.Tensor | None = None
    position_mask: torch.Tensor | None = None
    target_top_ids: torch.Tensor | None = None
    target_logsumexp: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    doc_remaining: torch.Tensor | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("logits", "target_probs", "position_mask") if getattr(self, name) is not None]
        if given not in (["logits"], ["target_probs", "position_mask"]):
            raise ContractError(
                f"a batch carries either logits or both target_probs and position_mask, got {given or 'neither'}"
            )

    def to_trainer_inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of NeMo AutoModel's `Eagle3TrainerModule.forward`."""
        inputs: dict[str, torch.Tensor | None] = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "loss_mask": self.loss_mask,
            "aux_hidden_states": self.aux_hidden_states,
            "target_logits": self.logits,
            "target_probs": self.target_probs,
            "position_mask": self.position_mask,
            "position_ids": self.position_ids,
            "seq_lens": self.seq_lens,
            "doc_remaining": self.doc_remaining,
        }
        return {name: value for name, value in inputs.items() if value is not None}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are set, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if value is not None}

    def to(self, device: torch.device | str) -> Eagle3TargetBatch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Eagle3TargetBatch:
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})
