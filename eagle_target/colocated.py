"""The target in the trainer's own process."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.assembly import BatchAssembler, TrainerRows, read_trainer_rows
from eagle_target.backend import Eagle3TargetBackend
from eagle_target.errors import AdapterError, ContractError
from eagle_target.info import ServedTarget
from eagle_target.layers import validate_aux_layer_ids
from eagle_target.supervision import SupervisionRequest, compute_supervision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.batch import Eagle3TargetBatch
    from eagle_target.projection import Encoding, RowPolicy
    from eagle_target.runner import DraftHead, TargetRunner
    from eagle_target.sequences import SeqLens
    from eagle_target.vocabulary import VocabMapping


class RunnerEagle3TargetModel(Eagle3TargetBackend):
    """Supervision from a runner in this process. One forward at a time, from any thread.

    Args:
        runner: a loaded target.
        aux_layer_ids: the three layers to capture; None for the EAGLE-3 default.
        encoding: `probs` projects the full head, `hidden` the draft's rows of it, `logits` leaves the projection to
            the trainer.
        rows: `supervised` projects only rows that can bear loss; `all` every row.
        probs_dtype: float32, bfloat16 or float16.
        device: where batches go; None for the runner's device.

    Raises:
        ContractError: layers out of range or not three.
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
        self.runner = runner
        self.aux_layer_ids = validate_aux_layer_ids(aux_layer_ids, runner.info.num_layers)
        runner.set_aux_layers(self.aux_layer_ids)
        self._encoding: Encoding = encoding
        self._rows: RowPolicy = rows
        self._probs_dtype = probs_dtype
        self._device = torch.device(runner.info.device if device is None else device)
        self._mapping: VocabMapping | None = None
        self._draft_head: DraftHead | None = None
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._closed = False

    def generate_batch(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        seq_lens: SeqLens | None = None,
        doc_remaining: torch.Tensor | None = None,
    ) -> Eagle3TargetBatch:
        """See `Eagle3TargetBackend.generate_batch`."""
        rows, request = self._read(
            input_ids,
            attention_mask,
            loss_mask,
            position_ids=position_ids,
            seq_lens=seq_lens,
            doc_remaining=doc_remaining,
        )
        return self._run(rows, request, self._draft_head)

    def generate_batch_async(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        seq_lens: SeqLens | None = None,
        doc_remaining: torch.Tensor | None = None,
    ) -> Future[Eagle3TargetBatch]:
        """See `Eagle3TargetBackend.generate_batch_async`; runs on one thread of the backend's own."""
        rows, request = self._read(
            input_ids,
            attention_mask,
            loss_mask,
            position_ids=position_ids,
            seq_lens=seq_lens,
            doc_remaining=doc_remaining,
        )
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="eagle-target-colocated")
        return self._executor.submit(self._run, rows, request, self._draft_head)

    def model_info(self) -> dict[str, Any]:
        """Facts about the target."""
        served = ServedTarget(info=self.runner.info, aux_layer_ids=self.aux_layer_ids)
        return {
            **self.runner.info.model_dump(mode="json"),
            "aux_layer_ids": list(self.aux_layer_ids),
            "fingerprint": served.fingerprint,
            "transport": "inprocess",
            "encoding": self._encoding,
        }

    def input_embedding_weight(self) -> torch.Tensor:
        """The runner's own tensor, moved to the backend's device."""
        with self._lock:
            self._check_open()
            return self.runner.input_embedding_weight().to(self._device)

    def close(self) -> None:
        """Stop the thread and release the runner."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
        with self._lock:
            if not self._closed:
                self._closed = True
                self.runner.close()

    def _use_mapping(self, mapping: VocabMapping) -> None:
        self._check_open()
        mapping.check_target(self.runner.info.vocab_size)
        if self._encoding == "hidden":
            with self._lock:
                head = self.runner.draft_head(mapping.selected_token_ids)
            if head is None:
                raise ContractError(
                    f"encoding 'hidden' needs a plain LM head, which {self.runner.info.model} has not: use 'probs'"
                )
            self._draft_head = head.to(self._device)
        self._mapping = mapping

    def _read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, loss_mask: torch.Tensor, **packing: Any
    ) -> tuple[TrainerRows, SupervisionRequest]:
        self._check_open()
        info = self.runner.info
        rows = read_trainer_rows(input_ids, attention_mask, loss_mask, vocab_size=info.vocab_size, **packing)
        request = rows.request(
            encoding=self._encoding, rows=self._rows, mapping=self._mapping, probs_dtype=self._probs_dtype
        )
        request.check(info)
        return rows, request

    def _check_open(self) -> None:
        if self._closed:
            raise AdapterError("this target is closed: build a new one")

    def _run(self, rows: TrainerRows, request: SupervisionRequest, draft_head: DraftHead | None) -> Eagle3TargetBatch:
        assembler = BatchAssembler(
            rows,
            request,
            draft_head=draft_head,
            device=self._device,
            allocate=lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype, device=self._device),
        )
        with self._lock:
            if self._closed:
                raise AdapterError("this target was closed while a batch waited: build a new one")
            compute_supervision(self.runner, request, assembler)
        with torch.no_grad():
            return assembler.finish()
