"""A loaded transformers model as a target runner."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from eagle_target.checkpoints.digest import module_digest
from eagle_target.contract.runner import TargetRunner
from eagle_target.contract.target import TargetInfo, validate_aux_layer_ids
from eagle_target.errors import AdapterError
from eagle_target.plugins.engine_errors import engine_call
from eagle_target_hf.architecture import find_architecture
from eagle_target_hf.batching import plan_batches
from eagle_target_hf.execution import run_batches
from eagle_target_hf.memory import ForwardMemory
from eagle_target_hf.options import DEFAULT_MAX_BATCH_TOKENS
from eagle_target_hf.probe import Proven, prove

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from eagle_target.contract.runner import DraftHead, TargetForward


class HFTargetRunner(TargetRunner):
    """Runs a loaded model; see `TargetRunner`. One thread at a time.

    The model is put into eval mode, here and before a forward that finds it training, and is otherwise not changed:
    not moved, no hook left on it, its parameters shared.

    Args:
        model: a loaded causal or image-text-to-text model.
        max_batch_tokens: slots of one forward, pads included; a longer sequence runs alone.
        name: what `info.model` says; by default where the model was loaded from.
        revision: what `info.revision` says.
        weights: what `info.weights` says; by default the digest of the model as it is in memory.

    Raises:
        AdapterError: the architecture cannot be captured.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        name: str | None = None,
        revision: str | None = None,
        weights: str | None = None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)
        architecture = find_architecture(model)
        device = architecture.device()
        model.eval()
        self._engine_call = partial(
            engine_call,
            engine="transformers",
            memory_remedy=f"lower max_batch_tokens, now {max_batch_tokens}",
            device=device,
        )
        with self._engine_call("the probe at load"):
            proven = prove(architecture)
        self._model: torch.nn.Module | None = model
        self._proven: Proven | None = proven
        self._device = device
        self._max_batch_tokens = max_batch_tokens
        self._memory = ForwardMemory(device)
        self._aux_layer_ids: tuple[int, ...] = ()
        self._computed_tokens = 0
        self._info = TargetInfo(
            model=name or getattr(model, "name_or_path", "") or type(model).__name__,
            revision=revision,
            weights=weights or module_digest(model),
            num_layers=len(architecture.layers),
            hidden_size=architecture.hidden_size,
            vocab_size=architecture.vocab_size,
            dtype=str(proven.execution.dtype).removeprefix("torch."),
            device=str(device),
            engine="hf",
            engine_version=version("transformers"),
            max_seq_len=architecture.max_seq_len,
        )

    @property
    def info(self) -> TargetInfo:
        """See `TargetRunner.info`."""
        return self._info

    @property
    @override
    def computed_tokens(self) -> int:
        """See `TargetRunner.computed_tokens`."""
        return self._computed_tokens

    @property
    @override
    def concurrent_head(self) -> bool:
        """See `TargetRunner.concurrent_head`: not where accelerate moves the head's weights in hooks."""
        _, proven = self._open()
        head = proven.execution.architecture.output_embedding()
        return proven.head is None or not hasattr(head, "_hf_hook")

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """See `TargetRunner.set_aux_layers`.

        Raises:
            AdapterError: one of them cannot be captured.
        """
        layers = validate_aux_layer_ids(aux_layer_ids, self._info.num_layers)
        _, proven = self._open()
        for layer in layers:
            if layer in proven.obstacles:
                name = proven.execution.architecture.name
                raise AdapterError(f"layer {layer} of {name}: {proven.obstacles[layer]}")
        self._aux_layer_ids = layers

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        """See `TargetRunner.forward_eagle3`; `[tokens, ...]` on `info.device`.

        Raises:
            AdapterError: no layers were set, the runner is closed, or the engine failed.
        """
        model, proven = self._open()
        if not self._aux_layer_ids:
            raise AdapterError("no layers to capture: call set_aux_layers first")
        if model.training:
            model.eval()
        execution = proven.execution
        with self._engine_call("the target's forward"):
            batches = plan_batches(
                seq_lens,
                layout=execution.layout,
                max_batch_tokens=self._max_batch_tokens,
                length_boundary=execution.architecture.length_boundary,
            )
            ids = input_ids.to(self._device)
            # Batches of one call follow each other: memory is that of the largest, and of all their states.
            with self._memory.measuring(len(ids)):
                forward = run_batches(execution, ids, batches, aux_layer_ids=self._aux_layer_ids)
        self._computed_tokens += sum(batch.rows * batch.width for batch in batches)
        return forward

    @override
    def token_capacity(self) -> int | None:
        """See `TargetRunner.token_capacity`; on CUDA, once a sizeable forward has been measured."""
        return self._memory.token_capacity()

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        """See `TargetRunner.compute_logits`.

        Raises:
            AdapterError: the head cannot be replayed (forwards then carry `logits`), or the engine failed.
        """
        _, proven = self._open()
        if proven.head is None:
            raise AdapterError(
                f"{proven.execution.architecture.name} gives no logits for hidden states: use those of its forward"
            )
        self._memory.note_head()
        with self._engine_call("the target's head"):
            return proven.head(last_hidden_states)

    def input_embedding_weight(self) -> torch.Tensor:
        """See `TargetRunner.input_embedding_weight`; shares the model's memory.

        Raises:
            AdapterError: the embedding is offloaded or quantised, or not as wide as the hidden states.
        """
        _, proven = self._open()
        weight = proven.execution.architecture.input_embedding()[: self._info.vocab_size].detach()
        expected = (self._info.vocab_size, self._info.hidden_size)
        is_offloaded = weight.device.type == "meta"
        if is_offloaded or not weight.is_floating_point() or tuple(weight.shape) != expected:
            given = "offloaded" if is_offloaded else f"{list(weight.shape)} of {weight.dtype}"
            raise AdapterError(f"the input embedding of {self._info.model} is {given}, expected {list(expected)}")
        return weight

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        """See `TargetRunner.draft_head`; a copy of the rows, on the head's device."""
        _, proven = self._open()
        form = proven.draft_form
        return None if form is None else form.rows(proven.execution.architecture, token_ids)

    def close(self) -> None:
        """Let go of the model; a model that somebody else holds stays as it is."""
        self._model = None
        self._proven = None

    def _open(self) -> tuple[torch.nn.Module, Proven]:
        if self._model is None or self._proven is None:
            raise AdapterError(f"the target {self._info.model} is closed: load it again")
        return self._model, self._proven
