"""What a trainer calls, wherever the target runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol, Self, overload

import torch

from eagle_target.prefetch import Prefetch
from eagle_target.vocabulary import VocabMapping

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from eagle_target.batch import Eagle3TargetBatch
    from eagle_target.sequences import SeqLens

    TrainerItem = Mapping[str, Any] | Sequence[torch.Tensor]


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
    def model_info(self) -> dict[str, Any]:
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
            self._use_mapping(VocabMapping.from_ids(mapping, int(self.model_info()["vocab_size"])))
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
