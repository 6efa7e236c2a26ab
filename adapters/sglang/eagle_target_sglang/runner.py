"""A loaded SGLang engine in this process as a target runner."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from eagle_target.checkpoints.digest import hub_commit
from eagle_target.contract.runner import DraftHead, TargetForward, TargetRunner
from eagle_target.contract.target import TargetInfo, validate_aux_layer_ids
from eagle_target.errors import AdapterError
from eagle_target_sglang import generations
from eagle_target_sglang.batching import PoolLimits
from eagle_target_sglang.capture import Capture, OfficialCapture
from eagle_target_sglang.failures import engine_call
from eagle_target_sglang.head import Head, input_embedding_weight
from eagle_target_sglang.versions import installed_version

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from eagle_target_sglang.options import SGLangOptions

PROBE_LENGTHS = (3, 5)


class SGLangTargetRunner(TargetRunner):
    """Runs a ModelRunner of SGLang; see `TargetRunner`. One thread at a time.

    A rank of a sharded target is one of these too: all ranks are called alike, in the same order.

    Args:
        model_runner: SGLang's, loaded, its pools free. model: where from. weights: what `info.weights` says.

    Raises:
        AdapterError: SGLang cannot capture layers of this model.
    """

    def __init__(self, model_runner: Any, *, model: str, options: SGLangOptions, weights: str | None = None) -> None:
        self._model_runner: Any | None = model_runner
        self._tp_size = options.tp_size
        self._device = _device_of(model_runner)
        config = model_runner.model_config
        sequences, tokens, page_size = generations.pool_limits(model_runner)
        self.limits = PoolLimits(
            sequences=sequences, tokens=tokens, page_size=page_size, context_length=int(config.context_len)
        )
        self._info = TargetInfo(
            model=model,
            revision=hub_commit(model, options.revision),
            weights=weights,
            num_layers=int(config.num_hidden_layers),
            hidden_size=int(config.hidden_size),
            vocab_size=int(config.vocab_size),
            dtype=str(config.dtype).removeprefix("torch."),
            device=str(self._device),
            engine="sglang",
            engine_version=installed_version("sglang") or "unknown",
            max_seq_len=self.limits.max_seq_len,
        )
        self._capture = (OfficialCapture if options.capture == "official" else Capture)(model_runner.model)
        self._has_layers = False
        self._head, self._draft_head_agrees = self._probe()

    @property
    def info(self) -> TargetInfo:
        """See `TargetRunner.info`."""
        return self._info

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """See `TargetRunner.set_aux_layers`."""
        layers = validate_aux_layer_ids(aux_layer_ids, self._info.num_layers)
        self._open()
        self._capture.set_layers(layers, self._info.num_layers)
        self._has_layers = True

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        """See `TargetRunner.forward_eagle3`; `[tokens, ...]` on `info.device`.

        Raises:
            AdapterError: no layers were set, a sequence is over a limit, the runner is closed, or the engine failed.
        """
        model_runner = self._open()
        if not self._has_layers:
            raise AdapterError("no layers to capture: call set_aux_layers first")
        if sum(seq_lens) != len(input_ids):
            raise AdapterError(f"seq_lens add up to {sum(seq_lens)}, input_ids has {len(input_ids)}")
        groups = list(self.limits.split(seq_lens))
        rows = [ids.tolist() for ids in torch.split(input_ids.cpu(), list(seq_lens))]
        with self._engine("the target's forward"):
            parts = (self._forward(model_runner, [rows[index] for index in group]) for group in groups)
            return next(parts) if len(groups) == 1 else _join(parts, len(input_ids))

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        """See `TargetRunner.compute_logits`; float32."""
        self._open()
        with self._engine("the target's head"):
            return self._head.compute_logits(last_hidden_states.to(self._device))

    @override
    def token_capacity(self) -> int | None:
        """See `TargetRunner.token_capacity`: one prefill fills the KV pool at most; more would be several."""
        return self.limits.tokens

    def input_embedding_weight(self) -> torch.Tensor:
        """See `TargetRunner.input_embedding_weight`."""
        model_runner = self._open()
        with self._engine("reading the input embedding"):
            return input_embedding_weight(model_runner.model, self._info.vocab_size, self._tp_size)

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        """See `TargetRunner.draft_head`; a copy of the rows."""
        self._open()
        with self._engine("reading the LM head"):
            return self._head.draft_head(token_ids) if self._draft_head_agrees else None

    def close(self) -> None:
        """Let go of the model. SGLang keeps its process group: the process cannot hold another engine."""
        if self._model_runner is not None:
            self._capture.close()
            self._model_runner = None
            del self._head, self._capture

    def _forward(self, model_runner: Any, rows: list[list[int]]) -> TargetForward:
        try:
            captured = self._capture.forward(model_runner, rows)
        finally:
            generations.free_pools(model_runner)
        return TargetForward(aux_hidden_states=captured.aux, last_hidden_states=captured.last)

    def _probe(self) -> tuple[Head, bool]:
        """One small forward: it shows the head, and that layers are captured row by row."""
        layers = tuple(range(min(3, self._info.num_layers)))
        self._capture.set_layers(layers, self._info.num_layers)
        generator = torch.Generator().manual_seed(0)
        rows = [
            torch.randint(0, self._info.vocab_size, (length,), generator=generator).tolist() for length in PROBE_LENGTHS
        ]
        with self._engine("the first forward"):
            forward = self._forward(self._model_runner, rows)
            head = Head(
                self._capture.processor,
                self._capture.lm_head,
                vocab_size=self._info.vocab_size,
                tp_size=self._tp_size,
            )
            return head, head.draft_head_agrees(forward.last_hidden_states)

    @contextmanager
    def _engine(self, what: str) -> Iterator[None]:
        # Each thread has a current CUDA device of its own, and kernels are launched on it.
        current = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        with current, engine_call(what, device=self._device):
            yield

    def _open(self) -> Any:
        if self._model_runner is None:
            raise AdapterError(f"the target {self._info.model} is closed: load it again")
        return self._model_runner


def _join(parts: Iterator[TargetForward], tokens: int) -> TargetForward:
    """Forwards one after another as one; besides it, no more than three parts are held."""
    first = next(parts)
    aux = first.aux_hidden_states.new_empty(tokens, first.aux_hidden_states.shape[1])
    last = first.last_hidden_states.new_empty(tokens, first.last_hidden_states.shape[1])
    start = 0
    for part in chain((first,), parts):
        end = start + len(part.last_hidden_states)
        aux[start:end] = part.aux_hidden_states
        last[start:end] = part.last_hidden_states
        start = end
    return TargetForward(aux_hidden_states=aux, last_hidden_states=last)


def _device_of(model_runner: Any) -> torch.device:
    device = torch.device(model_runner.device)
    if device.type == "cpu" or ":" in str(device):
        return device
    return torch.device(device.type, int(model_runner.gpu_id))
