"""The target in the trainer's own process, under vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.plugins.options import build_model
from eagle_target_vllm.adapter import VLLMAdapter
from eagle_target_vllm.options import VLLMOptions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eagle_target.contract.request import Encoding, RowPolicy


class VLLMEagle3TargetModel(RunnerEagle3TargetModel):
    """Supervision from a vLLM engine of this process's own; see `RunnerEagle3TargetModel`."""

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        aux_layer_ids: Sequence[int] | None = None,
        *,
        encoding: Encoding = "probs",
        rows: RowPolicy = "supervised",
        probs_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """Load a path or a hub id.

        Args:
            model_path: where the checkpoint is.
            aux_layer_ids, encoding, rows, probs_dtype, device: as for the class.
            options: fields of `VLLMOptions`.

        Raises:
            ConfigError: an unknown option, or a wrong value.
            AdapterError: vLLM refused, with its message kept.
        """
        dtype = options.get("dtype")
        if isinstance(dtype, torch.dtype):
            options["dtype"] = str(dtype).removeprefix("torch.")
        settings = build_model(VLLMOptions, options, "options of adapter 'vllm'")
        runner = VLLMAdapter.load(str(model_path), settings, aux_layer_ids)
        try:
            return cls(runner, aux_layer_ids, encoding=encoding, rows=rows, probs_dtype=probs_dtype, device=device)
        except BaseException:
            runner.close()
            raise
