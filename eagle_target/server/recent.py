"""What a server did in the last minutes, for its status page: samples of work, and problems by type."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SAMPLE_SECONDS = 5.0
SAMPLES = 120
STAGES = {
    "read": "the request's body comes in",
    "queue": "waits for engine and room",
    "forward": "the target runs",
    "projection": "logits, argmax, draft columns",
    "send": "until the answer is sent",
}


@dataclass(slots=True)
class StageTime:
    """Requests' time in a stage: of how many, seconds of all of them, and of the longest."""

    requests: int = 0
    seconds: float = 0.0
    longest: float = 0.0

    @property
    def mean(self) -> float:
        """Seconds of a request."""
        return self.seconds / self.requests

    def add(self, other: StageTime) -> None:
        """Count another's requests too."""
        self.requests += other.requests
        self.seconds += other.seconds
        self.longest = max(self.longest, other.longest)


@dataclass(slots=True)
class Sample:
    """Work that ended within `SAMPLE_SECONDS`."""

    requests: int = 0
    problems: int = 0
    tokens: int = 0
    sent_bytes: int = 0
    stages: dict[str, StageTime] = field(default_factory=dict)


@dataclass(slots=True)
class SeenProblem:
    """A type of problem: how often it was answered, and when and with which status the last time (`time.time()`)."""

    name: str
    status: int
    count: int
    last_at: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Work a second."""

    requests: float
    tokens: float
    sent_bytes: float


class Recent:
    """A ring of samples. Safe to use from several threads.

    Args:
        clock: seconds that never go back. wall: seconds since the epoch.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self._started = clock()
        self._ring: deque[Sample] = deque([Sample()], maxlen=SAMPLES + 1)
        self._index = 0
        self._problems: dict[str, SeenProblem] = {}

    @property
    def uptime(self) -> float:
        """Seconds since it was made."""
        return self._clock() - self._started

    def count(self, *, tokens: int, sent_bytes: int) -> None:
        """Count one supervised request."""
        with self._lock:
            sample = self._current()
            sample.requests += 1
            sample.tokens += tokens
            sample.sent_bytes += sent_bytes

    def count_stage(self, stage: str, seconds: float) -> None:
        """Count one request's time in a stage."""
        with self._lock:
            self._current().stages.setdefault(stage, StageTime()).add(StageTime(1, seconds, seconds))

    def count_problem(self, name: str, status: int) -> None:
        """Count one answered problem; names are the server's own, so there are few."""
        with self._lock:
            self._current().problems += 1
            seen = self._problems.setdefault(name, SeenProblem(name, status, 0, 0.0))
            seen.count += 1
            seen.status, seen.last_at = status, self._wall()

    def samples(self) -> list[Sample]:
        """The last `SAMPLES` that are over, oldest first; empty ones before the start."""
        with self._lock:
            self._current()
            done = list(self._ring)[:-1]
        return [*(Sample() for _ in range(SAMPLES - len(done))), *done]

    def rates(self, seconds: float = 60.0) -> Rates:
        """Work a second, over about the last so many seconds, or since the start."""
        with self._lock:
            self._current()
            inside = self._clock() - self._started - self._index * SAMPLE_SECONDS
            whole = max(0, round(seconds / SAMPLE_SECONDS) - 1)
            chosen = list(self._ring)[-(whole + 1) :]
        spent = max(inside + SAMPLE_SECONDS * (len(chosen) - 1), 1.0)
        return Rates(
            requests=sum(sample.requests for sample in chosen) / spent,
            tokens=sum(sample.tokens for sample in chosen) / spent,
            sent_bytes=sum(sample.sent_bytes for sample in chosen) / spent,
        )

    def stages(self) -> dict[str, StageTime]:
        """Time by stage over all samples, the present one too."""
        totals: dict[str, StageTime] = {}
        with self._lock:
            self._current()
            for sample in self._ring:
                for stage, spent in sample.stages.items():
                    totals.setdefault(stage, StageTime()).add(spent)
        return totals

    def problems(self) -> Sequence[SeenProblem]:
        """Types of problems answered since the start, the last one first."""
        with self._lock:
            return sorted(self._problems.values(), key=lambda seen: -seen.last_at)

    def _current(self) -> Sample:
        index = int((self._clock() - self._started) / SAMPLE_SECONDS)
        for _ in range(min(index - self._index, SAMPLES + 1)):
            self._ring.append(Sample())
        self._index = max(index, self._index)
        return self._ring[-1]
