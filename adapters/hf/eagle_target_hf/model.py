"""The target in the trainer's own process, under transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.plugins.options import build_model
from eagle_target_hf.adapter import HFAdapter
from eagle_target_hf.options import DEFAULT_MAX_BATCH_TOKENS, HFOptions
from eagle_target_hf.runner import HFTargetRunner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eagle_target.contract.request import Encoding, RowPolicy


class HFEagle3TargetModel(RunnerEagle3TargetModel):
    """Supervision from a transformers model in this process.

    Args:
        model: a loaded model, put into eval mode and otherwise not changed; or a runner of one.
        aux_layer_ids: the three layers to capture; None for the EAGLE-3 default.
        encoding, rows, probs_dtype, device: see `RunnerEagle3TargetModel`.
        max_batch_tokens: slots of one forward, pads included; a runner has its own.

    Raises:
        AdapterError: the architecture cannot be captured.
        ContractError: layers out of range or not three.
    """

    def __init__(
        self,
        model: Any,
        aux_layer_ids: Sequence[int] | None = None,
        *,
        encoding: Encoding = "probs",
        rows: RowPolicy = "supervised",
        probs_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
    ) -> None:
        runner = (
            model if isinstance(model, HFTargetRunner) else HFTargetRunner(model, max_batch_tokens=max_batch_tokens)
        )
        super().__init__(runner, aux_layer_ids, encoding=encoding, rows=rows, probs_dtype=probs_dtype, device=device)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        aux_layer_ids: Sequence[int] | None = None,
        *,
        encoding: Encoding = "probs",
        rows: RowPolicy = "supervised",
        probs_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Self:
        """Load a path or a hub id.

        Args:
            model_path: where the checkpoint is.
            aux_layer_ids, encoding, rows, probs_dtype: as for the class.
            options: fields of `HFOptions`; `device` is the target's, and batches go there too.

        Raises:
            ConfigError: an unknown option, or a wrong value.
            AdapterError: transformers refused, with its message kept.
        """
        settings = build_model(HFOptions, _with_dtype_name(options), "options of adapter 'hf'")
        runner = HFAdapter.load(str(model_path), settings, aux_layer_ids)
        return cls(runner, aux_layer_ids, encoding=encoding, rows=rows, probs_dtype=probs_dtype)


def _with_dtype_name(options: dict[str, Any]) -> dict[str, Any]:
    """Take torch's own dtype and device objects where the options have names."""
    plain = (torch.dtype, torch.device)
    return {
        key: str(value).removeprefix("torch.") if isinstance(value, plain) else value for key, value in options.items()
    }
