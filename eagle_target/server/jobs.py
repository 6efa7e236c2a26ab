"""What waits for the engine: a bounded queue that hands out what fits one forward."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eagle_target.errors import Overloaded, Unavailable
from eagle_target.rows import PackedTensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.runner import TargetRunner
    from eagle_target.supervision import SupervisionRequest

RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Supervised:
    """One request's supervision, packed, and where its time went, in seconds."""

    tensors: PackedTensors
    timings: dict[str, float]


@dataclass(slots=True, eq=False)
class Job:
    """A request that waits for the engine. make_tensors: gives the sink its supervision goes to."""

    request: SupervisionRequest
    make_tensors: Callable[[], PackedTensors] = PackedTensors
    future: Future[Supervised] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.perf_counter)


@dataclass(slots=True, eq=False)
class Call:
    """Something else that only the engine's thread may do."""

    function: Callable[[TargetRunner], Any]
    future: Future[Any] = field(default_factory=Future)


class JobQueue:
    """First in, first out; cancelled work takes no place.

    Args:
        max_waiting: work that may wait. max_batch_tokens: requests are joined up to this many tokens.
    """

    def __init__(self, *, max_waiting: int, max_batch_tokens: int) -> None:
        self._max_waiting = max_waiting
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Job | Call] = deque()
        self._changed = threading.Condition()
        self._closed: Unavailable | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, work: Job | Call) -> None:
        """Append work.

        Raises:
            Overloaded: the queue is full. Unavailable: it is closed, with the reason.
        """
        with self._changed:
            if self._closed is not None:
                raise self._closed
            if len(self._waiting) >= self._max_waiting:
                self._waiting = deque(waiting for waiting in self._waiting if not waiting.future.cancelled())
            if len(self._waiting) >= self._max_waiting:
                raise Overloaded(
                    f"{len(self._waiting)} requests wait, the queue holds {self._max_waiting}: try again, or another "
                    "server",
                    status=503,
                    problem="queue-full",
                    retry_after=RETRY_SECONDS,
                )
            self._waiting.append(work)
            self._changed.notify_all()

    def take(self) -> list[Job] | Call | None:
        """Wait for work: requests in order as long as they fit one forward; None when closed."""
        with self._changed:
            while not self._waiting:
                if self._closed is not None:
                    return None
                self._changed.wait()
            first = self._waiting.popleft()
            return first if isinstance(first, Call) else [first, *self._followers(first)]

    def close(self, reason: Unavailable) -> None:
        """Refuse what waits and what comes. Safe to call twice; the first reason stands."""
        with self._changed:
            self._closed = self._closed or reason
            refused, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for work in refused:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(reason)

    def _followers(self, first: Job) -> Sequence[Job]:
        followers: list[Job] = []
        tokens = first.request.tokens
        while self._waiting and isinstance(follower := self._waiting[0], Job):
            if not follower.future.cancelled():
                tokens += follower.request.tokens
                if tokens > self._max_batch_tokens:
                    break
                followers.append(follower)
            self._waiting.popleft()
        return followers
