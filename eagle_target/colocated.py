"""The target in the trainer's own process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from eagle_target.backend import BatchForm, RequestingBackend
from eagle_target.compute.supervise import compute_supervision
from eagle_target.contract.model_info import describe_target
from eagle_target.contract.target import ServedTarget, validate_aux_layer_ids
from eagle_target.devices import resolve_device
from eagle_target.errors import AdapterError
from eagle_target.plugins.options import build_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eagle_target.compute.layout import TrainerRows
    from eagle_target.contract.batch import Eagle3TargetBatch
    from eagle_target.contract.model_info import ModelInfo
    from eagle_target.contract.request import Encoding, RowPolicy, SupervisionRequest
    from eagle_target.contract.runner import DraftHead, TargetRunner
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.plugins.adapter import Adapter


class RunnerEagle3TargetModel(RequestingBackend):
    """Supervision from a runner in this process. One forward at a time, from any thread.

    Args:
        runner: a loaded target.
        aux_layer_ids: the three layers to capture; None for the EAGLE-3 default.
        encoding: `probs` projects the full head, `hidden` the draft's rows of it, `logits` leaves the projection to
            the trainer.
        rows: `supervised` projects only rows that can bear loss; `all` every row.
        probs_dtype: float32, bfloat16 or float16.
        device: where batches go; None for the runner's device. `cuda` is the calling thread's current one.

    Raises:
        ContractError: layers out of range or not three. ConfigError: no such device.
    """

    def __init__(
        self,
        runner: TargetRunner,
        aux_layer_ids: Sequence[int] | None = None,
        *,
        encoding: Encoding = "probs",
        rows: RowPolicy = "supervised",
        probs_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        batch_device = resolve_device(runner.info.device if device is None else device)
        super().__init__(runner.info, BatchForm(encoding, rows, probs_dtype, batch_device), workers=1)
        self.runner = runner
        self.aux_layer_ids = validate_aux_layer_ids(aux_layer_ids, runner.info.num_layers)
        runner.set_aux_layers(self.aux_layer_ids)
        self._engine = threading.Lock()

    def model_info(self) -> ModelInfo:
        """Facts about the target."""
        fingerprint = ServedTarget(info=self.info, aux_layer_ids=self.aux_layer_ids).fingerprint
        facts = describe_target(self.info, self.aux_layer_ids, fingerprint, self.form.encoding)
        return {**facts, "transport": "inprocess"}

    def input_embedding_weight(self) -> torch.Tensor:
        """See `Eagle3TargetBackend.input_embedding_weight`."""
        with self._engine:
            self._check_open()
            weight = self.runner.input_embedding_weight().detach()
            # A runner gives its model's own memory, which a trainer that writes to it would change.
            return weight.to(self.form.device, copy=True, memory_format=torch.contiguous_format)

    def _answer(self, rows: TrainerRows, request: SupervisionRequest, head: DraftHead | None) -> Eagle3TargetBatch:
        assembler = self._assembler(rows, request, head)
        with self._engine:
            self._check_open()
            compute_supervision(self.runner, request, assembler)
        with torch.no_grad():
            return assembler.finish()

    def _fetch_draft_head(self, mapping: VocabMapping) -> DraftHead | None:
        with self._engine:
            self._check_open()
            return self.runner.draft_head(mapping.selected_token_ids)

    def _closed_error(self) -> AdapterError:
        return AdapterError("this target is closed: build a new one")

    def _release(self) -> None:
        with self._engine:
            self.runner.close()


class PretrainedEagle3TargetModel(RunnerEagle3TargetModel):
    """Supervision from a checkpoint under one engine, in this process. adapter: the engine's, a subclass names it."""

    adapter: ClassVar[type[Adapter]]

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
            aux_layer_ids, encoding, rows, probs_dtype: see `RunnerEagle3TargetModel`.
            options: the engine's, by name; torch's own dtypes and devices are taken for their names. `device` is the
                target's where the engine has such an option, and batches go there; else only batches do.

        Raises:
            ConfigError: an unknown option, or a wrong value.
            AdapterError: the engine refused, with its message kept.
        """
        has_device = "device" in cls.adapter.options_model.model_fields
        batch_device = None if has_device else options.pop("device", None)
        named = {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype | torch.device) else value
            for name, value in options.items()
        }
        settings = build_model(cls.adapter.options_model, named, f"options of adapter {cls.adapter.name!r}")
        runner = cls.adapter.load(str(model_path), settings, aux_layer_ids)
        try:
            return cls(
                runner, aux_layer_ids, encoding=encoding, rows=rows, probs_dtype=probs_dtype, device=batch_device
            )
        except BaseException:
            runner.close()
            raise
