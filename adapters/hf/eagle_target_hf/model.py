"""The target in the trainer's own process, under transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from eagle_target.colocated import PretrainedEagle3TargetModel
from eagle_target_hf.adapter import HFAdapter
from eagle_target_hf.options import DEFAULT_MAX_BATCH_TOKENS
from eagle_target_hf.runner import HFTargetRunner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.request import Encoding, RowPolicy


class HFEagle3TargetModel(PretrainedEagle3TargetModel):
    """Supervision from a transformers model in this process; options of `from_pretrained` are those of `HFOptions`.

    Args:
        model: a loaded model, put into eval mode and otherwise not changed; or a runner of one.
        aux_layer_ids: the three layers to capture; None for the EAGLE-3 default.
        encoding, rows, probs_dtype, device: see `RunnerEagle3TargetModel`.
        max_batch_tokens: slots of one forward, pads included; a runner has its own.

    Raises:
        AdapterError: the architecture cannot be captured.
        ContractError: layers out of range or not three.
    """

    adapter = HFAdapter

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
