"""The second stage: supervision into answers, and answers to whoever waits; one bad request fails alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eagle_target.errors import AdapterError, ContractError, EngineDead, Unavailable
from eagle_target.server.engine.forwards import log_failure, release_frames
from eagle_target.server.engine.stages import engine_stopped
from eagle_target.server.log import about, hide_in_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.server.engine.answer import Answer
    from eagle_target.server.engine.forwards import Forwarded
    from eagle_target.server.engine.job import Part
    from eagle_target.server.engine.scheduler import JobQueue


class AnswerStage:
    """Answers parts that were run.

    Args:
        queue: where a part goes back to that failed beside others.
        tell: called with the failure of a part by itself, or None for one that went well; gives what is answered.
        stop: called with what ends a thread.
    """

    def __init__(
        self,
        queue: JobQueue,
        tell: Callable[[Exception | None], Exception | None],
        stop: Callable[[BaseException], None],
    ) -> None:
        self._queue = queue
        self._tell = tell
        self._stop = stop

    def handle(self, forwarded: Forwarded) -> None:
        """Answer every part; what is stored is let go of part by part."""
        if forwarded.error is not None:
            for part in forwarded.parts:
                self._fail(part, forwarded.error)
            return
        stores = forwarded.stores[::-1]
        forwarded.stores.clear()
        for part in forwarded.parts:
            if part.job.is_over:
                stores.pop()
                part.job.drop()
            else:
                self._answer(part, stores, is_alone=len(forwarded.parts) == 1)

    def abandon(self, forwarded: Forwarded, error: BaseException) -> None:
        """Answer what ended the thread's work on some parts."""
        forwarded.stores.clear()
        for part in forwarded.parts:
            part.job.fail(engine_stopped())
        self._stop(error)

    def _answer(self, part: Part, stores: list[Callable[[], Answer]], *, is_alone: bool) -> None:
        try:
            with about(part.job.subject):
                stores.pop()()
        except Exception as error:  # noqa: BLE001 - logged, and handed to whoever waits
            if is_alone:
                log_failure("a projection failed", error, part)
            release_frames(error)
            if is_alone or isinstance(error, EngineDead):
                self._fail(part, error)
            else:
                self._queue.put_back(part)
            return
        self._tell(None)
        part.job.finish_part()

    def _fail(self, part: Part, error: Exception) -> None:
        if isinstance(error, EngineDead):
            # Why an engine died is logged, and told to other clients too.
            hide_in_error(error, part.job.request.input_ids)
        told = self._tell(error) or error
        is_ours = isinstance(told, AdapterError | ContractError | Unavailable)
        part.job.fail(told if is_ours else _engine_error(told))


def _engine_error(error: Exception) -> AdapterError:
    failure = AdapterError(f"the engine failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
