"""What every backend does the same, wherever its target runs: rows to requests, mappings, threads."""

from __future__ import annotations

import threading
from abc import abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from eagle_target.assembly import BatchAssembler
from eagle_target.backend import Eagle3TargetBackend
from eagle_target.devices import is_numbered, use_device
from eagle_target.errors import ContractError
from eagle_target.trainer_rows import read_trainer_rows
from eagle_target.vocabulary import VocabMapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.batch import Eagle3TargetBatch
    from eagle_target.errors import EagleTargetError
    from eagle_target.info import TargetInfo
    from eagle_target.projection import Encoding, RowPolicy
    from eagle_target.runner import DraftHead
    from eagle_target.sequences import SeqLens
    from eagle_target.supervision import SupervisionRequest
    from eagle_target.trainer_rows import TrainerRows


class BatchForm(NamedTuple):
    """What the batches of a backend look like.

    encoding: `probs`, `hidden` or `logits`. rows: `supervised` or `all`.
    probs_dtype: float32, bfloat16 or float16. device: where batches go, a CUDA device with its number.
    """

    encoding: Encoding
    rows: RowPolicy
    probs_dtype: torch.dtype
    device: torch.device


class DraftVocabulary(NamedTuple):
    """A mapping, and the head's rows for it where the encoding needs them."""

    mapping: VocabMapping | None
    head: DraftHead | None


class RequestingBackend(Eagle3TargetBackend):
    """A backend that has requests answered; subclasses say how.

    Args:
        info: the target. form: what batches look like. workers: requests under way at a time, when asynchronous.

    Raises:
        ContractError: the form's device has no number.
    """

    def __init__(self, info: TargetInfo, form: BatchForm, *, workers: int) -> None:
        if not is_numbered(form.device):
            raise ContractError(f"batches go to {str(form.device)!r}, another device in each thread: name its number")
        self.info = info
        self.form = form
        self._workers = workers
        self._vocabulary = DraftVocabulary(None, None)
        self._state = threading.Lock()
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
        packing = {"position_ids": position_ids, "seq_lens": seq_lens, "doc_remaining": doc_remaining}
        return self._answer(*self._read(input_ids, attention_mask, loss_mask, packing))

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
        """See `Eagle3TargetBackend.generate_batch_async`; runs on threads of the backend's own."""
        packing = {"position_ids": position_ids, "seq_lens": seq_lens, "doc_remaining": doc_remaining}
        arguments = self._read(input_ids, attention_mask, loss_mask, packing)
        with self._state:
            self._check_open()
            if self._executor is None:
                self._executor = ThreadPoolExecutor(
                    self._workers,
                    thread_name_prefix="eagle-target-client",
                    initializer=use_device,
                    initargs=(self.form.device,),
                )
            return self._executor.submit(self._answer, *arguments)

    def close(self) -> None:
        """Cancel what waits, stop the threads and release the target."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            executor, self._executor = self._executor, None
        self._interrupt()
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)
        self._release()

    @abstractmethod
    def _answer(self, rows: TrainerRows, request: SupervisionRequest, head: DraftHead | None) -> Eagle3TargetBatch:
        """Have one request answered and its batch assembled."""

    @abstractmethod
    def _fetch_draft_head(self, mapping: VocabMapping) -> DraftHead | None:
        """The mapping's rows of the LM head; None where the head cannot be handed out."""

    @abstractmethod
    def _closed_error(self) -> EagleTargetError:
        """What a call after `close` raises."""

    def _share_mapping(self, mapping: VocabMapping) -> None:
        """Make a mapping known where requests are answered."""

    def _interrupt(self) -> None:
        """Make requests under way end soon."""

    @abstractmethod
    def _release(self) -> None:
        """Release the target; nothing is under way any more."""

    def _use_mapping(self, mapping: VocabMapping) -> None:
        self._check_open()
        mapping.check_target(self.info.vocab_size)
        # The trainer's own may be a draft's buffers, which change in place when a checkpoint is loaded.
        mapping = VocabMapping(mapping.selected_token_ids, mapping.selected_token_mask)
        head: DraftHead | None = None
        if self.form.encoding == "hidden":
            head = self._fetch_draft_head(mapping)
            if head is None:
                raise ContractError(
                    f"encoding 'hidden' needs a plain LM head, which {self.info.model} has not: use 'probs'"
                )
            head = head.to(self.form.device)
        self._share_mapping(mapping)
        # One assignment: a batch begun on another thread sees the old pair or the new one, never one of each.
        self._vocabulary = DraftVocabulary(mapping, head)

    def _read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, loss_mask: torch.Tensor, packing: dict[str, Any]
    ) -> tuple[TrainerRows, SupervisionRequest, DraftHead | None]:
        self._check_open()
        vocabulary, form = self._vocabulary, self.form
        rows = read_trainer_rows(input_ids, attention_mask, loss_mask, vocab_size=self.info.vocab_size, **packing)
        request = rows.request(
            encoding=form.encoding, rows=form.rows, mapping=vocabulary.mapping, probs_dtype=form.probs_dtype
        )
        request.check(self.info)
        return rows, request, vocabulary.head

    def _assembler(self, rows: TrainerRows, request: SupervisionRequest, head: DraftHead | None) -> BatchAssembler:
        return BatchAssembler(
            rows, request, info=self.info, draft_head=head, device=self.form.device, allocate=self._allocate
        )

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.form.device)

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed_error()
