"""What a trainer calls, wherever the target runs."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, overload

import torch

from eagle_target.compute.assembly import BatchAssembler
from eagle_target.compute.layout import read_trainer_rows
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.devices import is_numbered, use_device
from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from eagle_target.compute.layout import SeqLens
    from eagle_target.contract.batch import Eagle3TargetBatch

    TrainerItem = Mapping[str, Any] | Sequence[torch.Tensor]
    from collections.abc import Sequence

    from eagle_target.compute.layout import TrainerRows
    from eagle_target.contract.model_info import ModelInfo
    from eagle_target.contract.request import Encoding, RowPolicy, SupervisionRequest
    from eagle_target.contract.runner import DraftHead
    from eagle_target.contract.target import TargetInfo
    from eagle_target.errors import EagleTargetError

ARGUMENTS = ("input_ids", "attention_mask", "loss_mask", "position_ids", "seq_lens", "doc_remaining")
REQUIRED = ARGUMENTS[:3]


class BatchHandle(Protocol):
    """A batch that is on its way; a `concurrent.futures.Future` is one."""

    def result(self, timeout: float | None = None) -> Eagle3TargetBatch:
        """Wait for the batch, or raise what went wrong."""
        ...

    def cancel(self) -> bool:
        """Give the batch up; False when it is too late."""
        ...


class Eagle3TargetBackend(ABC):
    """A source of EAGLE-3 supervision. Use it as a context manager, or call `close`."""

    @abstractmethod
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
        """Return the supervision for `[batch, seq]` rows, padded or packed.

        Args:
            input_ids: int64 ids. attention_mask: 1 where a token is real. loss_mask: 1 where a token bears loss.
            position_ids: restarts at 0 with each sequence; derived when left out.
            seq_lens: `[batch, docs]` document lengths of packed rows, zero-padded.
            doc_remaining: real tokens after each one in its document; derived when left out.

        Raises:
            ContractError: the rows break the contract; nothing was sent.
            AdapterError, TransportError, ServerError: the target could not be asked.
        """

    @abstractmethod
    def generate_batch_async(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        seq_lens: SeqLens | None = None,
        doc_remaining: torch.Tensor | None = None,
    ) -> BatchHandle:
        """Like `generate_batch`, without waiting. Bad rows raise here, at once."""

    @property
    def supports_async(self) -> bool:
        """Whether `generate_batch_async` overlaps with the caller's work."""
        return True

    @abstractmethod
    def model_info(self) -> ModelInfo:
        """Facts about the target and how it is reached, as plain JSON data."""

    @abstractmethod
    def input_embedding_weight(self) -> torch.Tensor:
        """The target's input embedding `[vocab, hidden]` on the backend's device, in the model's dtype.

        Memory of its own, made anew at each call: the caller may write to it, and the target does not change.
        """

    def get_input_embeddings(self) -> torch.nn.Embedding:
        """Return a module whose `.weight` is a copy of the target's input embedding, to seed a draft.

        A parameter that can be trained, as any module's; a draft that keeps the embedding as it is freezes it. On the
        device where batches go, in the model's dtype, made anew at each call. The rows are the checkpoint's, without
        those that an engine pads its weight with: a factor that a model multiplies what it looks up with, as Gemma
        does, is not in them.
        """
        # Whatever the caller runs under, the weight is one that can be trained.
        with torch.inference_mode(mode=False):
            weight = self.input_embedding_weight()
            vocab_size, hidden_size = weight.shape
            return torch.nn.Embedding(vocab_size, hidden_size, _weight=weight)

    @overload
    def set_vocab_mapping(self, mapping: VocabMapping, /) -> None: ...
    @overload
    def set_vocab_mapping(self, selected_token_ids: torch.Tensor, selected_token_mask: torch.Tensor, /) -> None: ...
    def set_vocab_mapping(
        self, mapping: VocabMapping | torch.Tensor, selected_token_mask: torch.Tensor | None = None, /
    ) -> None:
        """Choose the draft vocabulary of the batches to come.

        Takes a `VocabMapping`, or its two tensors.

        Raises:
            VocabMappingError: the mapping is invalid or for another vocabulary.
        """
        if isinstance(mapping, VocabMapping):
            self._use_mapping(mapping)
        elif selected_token_mask is None:
            self._use_mapping(VocabMapping.from_ids(mapping, self.model_info()["vocab_size"]))
        else:
            self._use_mapping(VocabMapping(mapping, selected_token_mask))

    @abstractmethod
    def _use_mapping(self, mapping: VocabMapping) -> None:
        """Take a valid mapping for the batches to come."""

    def prefetch(self, items: Iterable[TrainerItem], depth: int = 2) -> Prefetch:
        """Iterate over the batches of `items`, in order, with up to `depth` on their way.

        An item is a mapping with the arguments of `generate_batch` by name (others are ignored), or a sequence of
        `input_ids, attention_mask, loss_mask`.
        """
        return Prefetch(self, items, depth)

    @abstractmethod
    def close(self) -> None:
        """Release everything. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


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
        # The rows' own check has seen the ids.
        request.check_but_ids(self.info)
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


class Prefetch:
    """Iterator over batches, in the order of the items; `close` cancels what is on its way.

    An error of the items' iterator or of a batch is raised at that batch's turn, after the batches before it; what
    is behind it is cancelled.
    """

    def __init__(self, backend: Eagle3TargetBackend, items: Iterable[TrainerItem], depth: int) -> None:
        self._handles: deque[BatchHandle] = deque()
        self._failure: BaseException | None = None
        self._exhausted = False
        if depth < 1:
            raise ContractError(f"prefetch depth must be at least 1, got {depth}")
        self._backend = backend
        self._items = iter(items)
        self._depth = depth

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Eagle3TargetBatch:
        self._fill(self._depth)
        if not self._handles:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            raise StopIteration
        handle = self._handles.popleft()
        try:
            batch = handle.result()
        except BaseException:
            handle.cancel()
            self.close()
            raise
        self._fill(self._depth)
        return batch

    def close(self) -> None:
        """Cancel what is on its way and stop. Safe to call twice."""
        self._exhausted = True
        self._failure = None
        while self._handles:
            self._handles.pop().cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _fill(self, depth: int) -> None:
        while not self._exhausted and len(self._handles) < depth:
            try:
                self._handles.append(self._submit(next(self._items)))
            except StopIteration:
                self._exhausted = True
            except Exception as failure:  # noqa: BLE001 - raised at its turn, after the batches before it
                self._failure = failure
                self._exhausted = True

    def _submit(self, item: TrainerItem) -> BatchHandle:
        if isinstance(item, Mapping):
            arguments: dict[str, Any] = {name: item[name] for name in ARGUMENTS if name in item}
        else:
            arguments = dict(zip(REQUIRED, item, strict=False))
        missing = [name for name in REQUIRED if name not in arguments]
        if missing:
            raise ContractError(
                f"an item of prefetch lacks {missing}: give a mapping with {list(REQUIRED)}, or a sequence of the three"
            )
        return self._backend.generate_batch_async(**arguments)
