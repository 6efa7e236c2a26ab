"""The target in the trainer's own process, or in ranks that it owns, under SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from eagle_target.colocated import PretrainedEagle3TargetModel
from eagle_target_sglang.adapter import SGLangAdapter
from eagle_target_sglang.options import SGLangOptions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eagle_target.contract.request import Encoding, RowPolicy


class SGLangEagle3TargetModel(PretrainedEagle3TargetModel):
    """Supervision from SGLang without a server; see `RunnerEagle3TargetModel` and `from_pretrained`."""

    adapter = SGLangAdapter

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        aux_layer_ids: Sequence[int] | None = None,
        dtype: torch.dtype | str | None = None,
        tp_size: int = 1,
        trust_remote_code: bool = False,
        *,
        encoding: Encoding = "probs",
        rows: RowPolicy = "supervised",
        probs_dtype: torch.dtype = torch.float32,
        **sglang_kwargs: Any,
    ) -> Self:
        """Load a path or a hub id.

        Args:
            model_path: where the checkpoint is.
            aux_layer_ids: the three layers to capture; None for the EAGLE-3 default.
            dtype: of the weights; None for the checkpoint's.
            tp_size: ranks; with one, the engine runs in this process, which can hold one.
            trust_remote_code: run model code that comes with the checkpoint.
            encoding, rows, probs_dtype: see `RunnerEagle3TargetModel`.
            sglang_kwargs: fields of `SGLangOptions`, and arguments of SGLang's `ServerArgs`.

        Raises:
            ConfigError: an unknown option or argument, or a wrong value.
            AdapterError: SGLang refused, with its message kept.
        """
        known = {name: value for name, value in sglang_kwargs.items() if name in SGLangOptions.model_fields}
        further = {name: value for name, value in sglang_kwargs.items() if name not in known}
        return super().from_pretrained(
            model_path,
            aux_layer_ids,
            encoding=encoding,
            rows=rows,
            probs_dtype=probs_dtype,
            dtype="auto" if dtype is None else dtype,
            tp_size=tp_size,
            trust_remote_code=trust_remote_code,
            **known | {"server_args": {**known.get("server_args", {}), **further}},
        )
