"""Chooses among servers: least outstanding first, elsewhere after a failure."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from eagle_target.errors import (
    AdapterError,
    ConnectError,
    EagleTargetError,
    Overloaded,
    ProtocolError,
    RequestTooLarge,
    ServerError,
    TransferTimeout,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.client.peer import Peer

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
BUSY_PAUSE_SECONDS = 0.2
REQUEST_TIMEOUT = 408
Answer = TypeVar("Answer")


@dataclass(slots=True, eq=False)
class Standing:
    """How one server is doing."""

    peer: Peer
    outstanding: int = 0
    failures: int = 0
    paused_until: float = 0.0
    last_error: str | None = None

    def fail(self, error: Exception) -> None:
        """Leave the server alone for a while, longer with every failure in a row."""
        self.last_error = str(error)
        if self.failures and time.monotonic() < self.paused_until:
            return  # of the same outage: it was under way when the pause began
        self.failures += 1
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (self.failures - 1), LONGEST_PAUSE_SECONDS)
        self.paused_until = time.monotonic() + pause

    def succeed(self) -> None:
        """Forget earlier failures."""
        self.failures, self.paused_until, self.last_error = 0, 0.0, None


class Dispatcher:
    """Runs pure requests on one of several servers.

    Args:
        peers: the servers. max_retries: further attempts after a failed one.
        timeout: seconds a full queue or a server that loads is waited for, across attempts.
    """

    def __init__(self, peers: Sequence[Peer], *, max_retries: int, timeout: float) -> None:
        self.standings = [Standing(peer) for peer in peers]
        self._max_retries = max_retries
        self._timeout = timeout
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.retries = 0

    def run(self, operation: Callable[[Peer], Answer]) -> Answer:
        """Run an operation, again and elsewhere as long as that can help.

        Raises:
            EagleTargetError: what the last attempt raised, with the servers that were tried named.
        """
        deadline = time.monotonic() + self._timeout
        tried: list[Standing] = []
        while True:
            standing = self._choose(tried)
            try:
                answer = operation(standing.peer)
            except EagleTargetError as error:
                self._release(standing, error)
                if not is_retryable(error):
                    raise
                if is_busy(error) and time.monotonic() < deadline and not self._stopped.is_set():
                    self._pause(standing, error)
                    continue
                tried.append(standing)
                if len(tried) > self._max_retries or self._stopped.is_set():
                    raise _exhausted(error, tried) from error
                self.retries += 1
                logger.warning("attempt %d of a batch failed and is made again: %s", len(tried), error)
            except BaseException as error:
                self._release(standing, error)
                raise
            else:
                self._release(standing, None)
                return answer

    def stop(self) -> None:
        """Make no further attempts."""
        self._stopped.set()

    def _choose(self, tried: Sequence[Standing]) -> Standing:
        """The healthy server with the least outstanding, those not tried yet first; wait if all are paused."""
        while True:
            with self._lock:
                now = time.monotonic()
                healthy = [standing for standing in self.standings if standing.paused_until <= now]
                if healthy or self._stopped.is_set():
                    best = min(healthy or self.standings, key=lambda s: (s in tried, s.outstanding, s.failures))
                    best.outstanding += 1
                    return best
                pause = min(standing.paused_until for standing in self.standings) - now
            self._stopped.wait(max(pause, 0.01))

    def _release(self, standing: Standing, error: BaseException | None) -> None:
        with self._lock:
            standing.outstanding -= 1
            if error is None:
                standing.succeed()
            elif isinstance(error, EagleTargetError) and is_retryable(error) and not is_busy(error):
                standing.fail(error)

    def _pause(self, standing: Standing, error: EagleTargetError) -> None:
        """Leave a busy server alone for as long as it asks; others are asked meanwhile."""
        seconds = getattr(error, "retry_after", None) or BUSY_PAUSE_SECONDS
        with self._lock:
            standing.paused_until = time.monotonic() + min(seconds, self._timeout)


def is_retryable(error: EagleTargetError) -> bool:
    """Whether the same request may go well on another server, or later."""
    if isinstance(error, RequestTooLarge):
        return False
    if isinstance(error, ServerError):
        return error.status >= 500 or error.status == REQUEST_TIMEOUT
    return isinstance(error, ConnectError | TransferTimeout | ProtocolError | AdapterError)


def is_busy(error: EagleTargetError) -> bool:
    """Whether the server is well and only asks to wait: its queue is full, or it still loads."""
    return isinstance(error, Overloaded) or (isinstance(error, Unavailable) and error.problem == "loading")


def _exhausted(error: EagleTargetError, tried: Sequence[Standing]) -> EagleTargetError:
    urls = [standing.peer.url for standing in tried]
    message = f"{error} (gave up after {len(tried)} attempts, on {', '.join(urls)})"
    if isinstance(error, ServerError):
        return type(error)(message, status=error.status, problem=error.problem, retry_after=error.retry_after)
    return type(error)(message)
