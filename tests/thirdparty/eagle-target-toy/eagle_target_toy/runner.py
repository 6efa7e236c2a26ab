"""The engine behind the `TargetRunner` protocol."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from eagle_target.plugins import (
    AdapterError,
    DraftHead,
    TargetForward,
    TargetInfo,
    TargetRunner,
    validate_aux_layer_ids,
)
from eagle_target_toy.llama import Llama, UnsupportedCheckpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target_toy.adapter import ToyOptions


class ToyRunner(TargetRunner):
    """A Llama on the CPU, each sequence by itself."""

    def __init__(self, llama: Llama, info: TargetInfo) -> None:
        self._llama: Llama | None = llama
        self._info = info
        self._aux_layer_ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, model: str, options: ToyOptions) -> ToyRunner:
        """Load a folder.

        Raises:
            AdapterError: the checkpoint cannot be run, with the reason.
        """
        dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
        try:
            llama = Llama(Path(model), dtype)
        except UnsupportedCheckpoint as error:
            raise AdapterError(f"adapter 'toy' cannot load {model!r}: {error}") from error
        info = TargetInfo(
            model=model,
            num_layers=llama.shape.layers,
            hidden_size=llama.shape.hidden,
            vocab_size=llama.shape.vocab,
            dtype=str(llama.dtype).removeprefix("torch."),
            device="cpu",
            engine="toy",
            engine_version=version("eagle-target-toy"),
            max_seq_len=options.max_seq_len or llama.shape.max_seq_len,
        )
        return cls(llama, info)

    @property
    def info(self) -> TargetInfo:
        """Facts about the target."""
        return self._info

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """Choose the layers to capture."""
        self._aux_layer_ids = validate_aux_layer_ids(aux_layer_ids, self._info.num_layers)

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        """Run each sequence."""
        llama = self._open()
        if not self._aux_layer_ids:
            raise AdapterError("no layers to capture: call set_aux_layers first")
        aux, last = [], []
        with torch.no_grad():
            for ids in torch.split(input_ids, list(seq_lens)):
                layers, normed = llama.run(ids)
                aux.append(torch.cat([layers[layer] for layer in self._aux_layer_ids], dim=1))
                last.append(normed)
        return TargetForward(aux_hidden_states=torch.cat(aux), last_hidden_states=torch.cat(last))

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        """`[n, hidden]` -> `[n, vocab]`."""
        return DraftHead(weight=self._open().head).compute_logits(last_hidden_states)

    def input_embedding_weight(self) -> torch.Tensor:
        """The input embedding."""
        return self._open().embedding

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        """Rows of the LM head."""
        return DraftHead(weight=self._open().head[token_ids])

    def close(self) -> None:
        """Let go of the weights."""
        self._llama = None

    def _open(self) -> Llama:
        if self._llama is None:
            raise AdapterError(f"the target {self._info.model} is closed: load it again")
        return self._llama
