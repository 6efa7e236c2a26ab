"""What runs next: from a bounded queue, fair between clients, in order within a client, with room for the answer."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eagle_target.protocol.problems import ProblemType
from eagle_target.server.engine.job import RETRY_SECONDS, Call, Job, Part

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.errors import EagleTargetError
    from eagle_target.server.engine.outbox import Outbox

# How often a taker that waits for room in the outbox looks again by itself.
ROOM_SECONDS = 0.1
# How long a taker waits for work before it is told that there is none.
IDLE_SECONDS = 5.0


@dataclass(slots=True, eq=False)
class Line:
    """One client's requests, in order. served: tokens of it that were taken, on the clock of all lines."""

    jobs: deque[Job] = field(default_factory=deque)
    served: int = 0


class Scheduler:
    """Hands out what fits one forward: from the client that was served least, first in, first out within a client.

    Every part that is taken is finished later, whatever became of it. A job that is over is released when none of its
    parts is out any more.

    Args:
        max_waiting: requests that may wait. outbox: where a request's answer must have room before it is handed out.
    """

    def __init__(self, *, max_waiting: int, outbox: Outbox) -> None:
        self._max_waiting = max_waiting
        self._outbox = outbox
        self._lines: dict[str, Line] = {}
        self._calls: deque[Call] = deque()
        self._again: deque[Part] = deque()
        self._out: Counter[Job] = Counter()
        self._given_up: list[Job] = []
        self._clock = 0
        self._was_call = False
        # One lock for both, so that a taker waits for work and for room at the same time.
        self._changed = outbox.changed
        self._closed: EagleTargetError | None = None
        self._is_over = False

    def __len__(self) -> int:
        with self._changed:
            waiting = sum(not job.is_started for line in self._lines.values() for job in line.jobs)
            return waiting + len(self._calls) + len(self._again)

    def put(self, work: Job | Call) -> None:
        """Append work. In a full queue a client takes the place of another's last request, if that has more waiting.

        Raises:
            Overloaded: the queue is full. Unavailable: it is closed, with the reason.
        """
        displaced: Job | None = None
        with self._changed:
            if self._closed is not None:
                raise self._closed
            if len(self) >= self._max_waiting:
                self._forget_given_up()
            if len(self) >= self._max_waiting:
                displaced = self._displace(work)
            if isinstance(work, Call):
                self._calls.append(work)
            else:
                line = self._lines.setdefault(work.client, Line())
                if not line.jobs:
                    # What a client left unused while it asked for nothing is not saved up.
                    line.served = max(line.served, self._clock)
                line.jobs.append(work)
            self._changed.notify_all()
        self._release_given_up()
        if displaced is not None:
            displaced.fail(self._overloaded())

    def take(self, room: Callable[[], int]) -> list[Part] | Call | None:
        """Wait for work: parts of up to `room()` tokens, or a larger one; no parts after a while, None when closed.

        room: asked once there is work, since what fits changes while there is none.
        """
        while True:
            is_idle = False
            with self._changed:
                work = self._next(room)
                if work is None and not self._given_up:
                    if self._closed is not None:
                        return None
                    is_woken = self._changed.wait(ROOM_SECONDS if self._has_jobs() else IDLE_SECONDS)
                    is_idle = not is_woken and not self._has_jobs()
            self._release_given_up()
            if work is not None:
                return work
            if is_idle:
                return []

    def put_back(self, part: Part) -> None:
        """Have a part that failed beside others run again, next and by itself."""
        with self._changed:
            if self._closed is None:
                self._again.append(part)
                self._changed.notify_all()
                return
        part.job.fail(self._closed)

    def finish(self, part: Part) -> None:
        """A part that was taken is answered, failed, given up or put back: nothing works on it any more."""
        job = part.job
        with self._changed:
            self._out[job] -= 1
            if not self._out[job]:
                del self._out[job]
            is_released = job.is_over and job not in self._out
        if is_released:
            job.release()

    def close(self, reason: EagleTargetError) -> None:
        """Refuse what waits and what comes. Safe to call twice; the first reason stands."""
        with self._changed:
            if self._is_over:
                return
            self._is_over = True
            refused = self._refuse(reason)
        self._fail(refused, reason)

    def pause(self, reason: EagleTargetError) -> None:
        """Refuse what waits, and what comes until it is resumed; nothing is handed out meanwhile."""
        with self._changed:
            if self._is_over:
                return
            refused = self._refuse(reason)
        self._fail(refused, reason)

    def resume(self) -> None:
        """Take work again after a pause, unless it is closed."""
        with self._changed:
            if not self._is_over:
                self._closed = None

    def abandon(self, reason: EagleTargetError) -> None:
        """Close, and answer what is out, too: nobody waits for what does not come back."""
        self.close(reason)
        with self._changed:
            out = [*self._out]
        for job in out:
            job.fail(reason)

    def _refuse(self, reason: EagleTargetError) -> list[Job | Call]:
        self._closed = reason
        refused: list[Job | Call] = [*self._calls, *(part.job for part in self._again)]
        refused += [job for line in self._lines.values() for job in line.jobs]
        self._calls.clear()
        self._again.clear()
        self._lines.clear()
        self._changed.notify_all()
        return refused

    def _fail(self, refused: list[Job | Call], reason: EagleTargetError) -> None:
        for work in refused:
            work.fail(reason)
        with self._changed:
            over = [work for work in refused if isinstance(work, Job) and work not in self._out]
        for job in over:
            job.release()
        self._release_given_up()

    def _next(self, room: Callable[[], int]) -> list[Part] | Call | None:
        """A call or parts, in turns."""
        if self._calls and not (self._was_call and (self._again or self._has_jobs())):
            self._was_call = True
            return self._calls.popleft()
        parts = self._fill(room)
        if parts:
            self._was_call = False
            return parts
        return self._calls.popleft() if self._calls else None

    def _fill(self, room: Callable[[], int]) -> list[Part]:
        if self._again:
            part = self._again.popleft()
            self._out[part.job] += 1
            return [part]
        self._forget_given_up()
        open_lines = {client: line for client, line in self._lines.items() if line.jobs}
        left = room() if open_lines else 0
        parts: list[Part] = []
        while open_lines and (left > 0 or not parts):
            client, line = min(open_lines.items(), key=lambda item: item[1].served)
            part = Part(line.jobs[0], line.jobs[0].waiting[0])
            if (parts and part.tokens > left) or not self._has_room(part.job):
                del open_lines[client]
                continue
            parts.append(part)
            left -= part.tokens
            self._remove(line, part)
            line.served += part.tokens
            if not line.jobs:
                del open_lines[client]
        self._forget_idle()
        return parts

    def _forget_idle(self) -> None:
        """Forget clients that ask for nothing: what they had counts as long as others waited for it."""
        anyone = self._has_jobs()
        self._lines = {
            client: line for client, line in self._lines.items() if line.jobs or (anyone and line.served > self._clock)
        }

    def _has_jobs(self) -> bool:
        return any(line.jobs for line in self._lines.values())

    def _remove(self, line: Line, part: Part) -> None:
        """Take a line's first part off it."""
        self._out[part.job] += 1
        part.job.waiting.popleft()
        if not part.job.waiting:
            line.jobs.popleft()
        self._clock = max(self._clock, line.served)

    def _has_room(self, job: Job) -> bool:
        if job.claim is None:
            job.claim = self._outbox.claim(job.client, job.answer_bytes)
        return job.claim is not None

    def _forget_given_up(self) -> None:
        for line in self._lines.values():
            for job in [job for job in line.jobs if job.is_over]:
                line.jobs.remove(job)
                self._given_up.append(job)
        self._calls = deque(call for call in self._calls if not call.future.cancelled())

    def _release_given_up(self) -> None:
        """Release them without the lock: memory goes back under locks of its own, beside which this one is taken."""
        with self._changed:
            given_up, self._given_up = self._given_up, []
            over = [job for job in given_up if job not in self._out]
        for job in over:
            job.release()

    def _displace(self, work: Job | Call) -> Job:
        """Take the last request of the client that has most waiting out of the queue, for a client that has less."""
        line = max(self._lines.values(), key=lambda line: len(line.jobs), default=None)
        mine = self._lines.get(work.client) if isinstance(work, Job) else None
        waiting = 0 if mine is None else len(mine.jobs)
        if line is None or isinstance(work, Call) or len(line.jobs) <= waiting + 1 or line.jobs[-1].is_started:
            raise self._overloaded()
        return line.jobs.pop()

    def _overloaded(self) -> EagleTargetError:
        return ProblemType.QUEUE_FULL.error(
            f"{len(self)} requests wait, the queue holds {self._max_waiting}: try again, or another server",
            retry_after=RETRY_SECONDS,
        )
