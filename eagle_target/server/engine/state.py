"""What a server is doing, and why it does not serve where it does not."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Literal

from eagle_target.errors import AdapterError, EngineStuck, Unavailable
from eagle_target.server.engine.job import RETRY_SECONDS

if TYPE_CHECKING:
    from eagle_target.contract.target import ServedTarget

State = Literal["loading", "ready", "degraded", "draining", "failed", "closed"]
SERVING_STATES = ("ready", "degraded")


class ServerState:
    """One server's state; changed and read from any thread.

    Attributes:
        name: see docs/life.md. failure: the last one, until a forward goes well again.
        served: what is served, once it was loaded. loads: how often it was.
        ended_by: the kind of failure that the server does not go on after.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.name: State = "loading"
        self.failure: str | None = None
        self.served: ServedTarget | None = None
        self.loads = 0
        self.ended_by: type[AdapterError] | None = None

    @property
    def is_serving(self) -> bool:
        """Whether requests are taken."""
        return self.name in SERVING_STATES and self.ended_by is None

    @property
    def is_restartable(self) -> bool:
        """Whether an engine that died is worth loading again: it served once, and the server is not to end."""
        return self.served is not None and self.name in (*SERVING_STATES, "loading") and self.ended_by is None

    def unavailable(self) -> Unavailable:
        """What a request gets that is not taken."""
        reason = f"the server is {self.name}" + (f": {self.failure}" if self.failure else "")
        return Unavailable(reason, status=503, problem=self.name, retry_after=RETRY_SECONDS)

    def loaded(self, served: ServedTarget) -> None:
        """The target is there."""
        with self._lock:
            self.served = served
            self.loads += 1
            if self.name == "loading":
                self.name, self.failure = "ready", None

    def note(self, failure: Exception | None) -> None:
        """How the last forward went."""
        with self._lock:
            if self.is_serving:
                self.name = "ready" if failure is None else "degraded"
                self.failure = None if failure is None else f"{type(failure).__name__}: {failure}"

    def reload(self, failure: str) -> None:
        """The engine is gone and is loaded again; a server that drains or is closed stays what it is."""
        with self._lock:
            self.failure = failure
            if self.name in SERVING_STATES:
                self.name = "loading"

    def fail(self, failure: str, kind: type[AdapterError]) -> None:
        """There is no engine any more."""
        with self._lock:
            self.failure = failure
            self.ended_by = self.ended_by or kind
            if self.name != "closed":
                self.name = "failed"

    def stick(self, failure: str) -> None:
        """The engine is there, but does not return."""
        with self._lock:
            self.failure = failure
            self.ended_by = self.ended_by or EngineStuck
            if self.name != "closed":
                self.name = "degraded"

    def drain(self) -> None:
        """Take no more requests."""
        with self._lock:
            if self.name in (*SERVING_STATES, "loading") and self.ended_by is None:
                self.name = "draining"

    def close(self) -> None:
        """Take nothing, for good."""
        with self._lock:
            self.name = "closed"
