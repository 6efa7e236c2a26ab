"""Keeps a few batches on their way while the trainer works on one."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from eagle_target.backend import BatchHandle, Eagle3TargetBackend, TrainerItem
    from eagle_target.batch import Eagle3TargetBatch

ARGUMENTS = ("input_ids", "attention_mask", "loss_mask", "position_ids", "seq_lens", "doc_remaining")
REQUIRED = ARGUMENTS[:3]


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
