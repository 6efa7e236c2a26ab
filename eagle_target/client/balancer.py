"""Chooses among servers: least outstanding first, elsewhere after a failure."""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from eagle_target.backoff import backoff
from eagle_target.errors import (
    AdapterError,
    ConnectError,
    EagleTargetError,
    Overloaded,
    RequestTooLarge,
    ServerError,
    TransferTimeout,
    TransportError,
    TransportRefused,
    Unavailable,
)
from eagle_target.protocol.problems import ProblemType

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.client.session import ServerSession
    from eagle_target.contract.model_info import ServerState

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
BUSY_PAUSE_SECONDS = 0.2
Answer = TypeVar("Answer")


@dataclass(slots=True, eq=False)
class ServerHealth:
    """How one server is doing.

    outstanding: requests under way. failures: in a row. paused_until: `time.monotonic()` at which it is asked again.
    """

    session: ServerSession
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
        pause = backoff(self.failures, first=FIRST_PAUSE_SECONDS, longest=LONGEST_PAUSE_SECONDS)
        self.paused_until = time.monotonic() + pause

    def succeed(self) -> None:
        """Forget earlier failures."""
        self.failures, self.paused_until, self.last_error = 0, 0.0, None

    def describe(self) -> ServerState:
        """As `model_info` tells it."""
        return {
            "url": self.session.url,
            "transport": self.session.transport,
            "transports_refused": dict(self.session.refused),
            "fallbacks": self.session.fallbacks,
            "healthy": self.failures == 0,
            "failures": self.failures,
            "paused_seconds": round(max(self.paused_until - time.monotonic(), 0.0), 3),
            "outstanding": self.outstanding,
            "last_error": self.last_error,
        }


class Balancer:
    """Runs pure requests on one of several servers.

    Args:
        sessions: the servers. max_retries: further attempts after a failed one.
        timeout: seconds a full queue or a server that loads is waited for, across attempts.
        retry_timeout: seconds from a request's first failure for which it is tried beyond `max_retries`, while
            servers cannot be reached.

    Attributes:
        servers: in the order of the sessions. retries: attempts that were made again so far.
    """

    def __init__(
        self, sessions: Sequence[ServerSession], *, max_retries: int, timeout: float, retry_timeout: float = 0.0
    ) -> None:
        self.servers = [ServerHealth(session) for session in sessions]
        self.retries = 0
        self._max_retries = max_retries
        self._retry_timeout = retry_timeout
        self._timeout = timeout
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def run(self, operation: Callable[[ServerSession], Answer]) -> Answer:
        """Run an operation, again and elsewhere as long as that can help.

        Raises:
            EagleTargetError: what the last attempt raised, with the servers that were tried named.
        """
        deadline = time.monotonic() + self._timeout
        last_chance = math.inf
        tried: list[ServerHealth] = []
        while True:
            server = self._choose(tried, last_chance)
            try:
                answer = operation(server.session)
            except EagleTargetError as error:
                self._release(server, error)
                if not is_retryable(error):
                    raise
                if is_busy(error) and time.monotonic() < deadline and not self._stopped.is_set():
                    self._pause(server, error)
                    continue
                if not tried:
                    last_chance = time.monotonic() + self._retry_timeout
                tried.append(server)
                if self._is_given_up(error, tried, last_chance):
                    raise _exhausted(error, tried) from error
                self.retries += 1
                logger.warning("attempt %d of a batch failed and is made again: %s", len(tried), error)
            except BaseException as error:
                self._release(server, error)
                raise
            else:
                self._release(server, None)
                return answer

    def stop(self) -> None:
        """Make no further attempts."""
        self._stopped.set()

    def _is_given_up(self, error: EagleTargetError, tried: Sequence[ServerHealth], last_chance: float) -> bool:
        """True when no further attempt is made: there is one as long as a server is well as far as is known."""
        if self._stopped.is_set():
            return True
        if len(tried) <= self._max_retries or (is_outage(error) and time.monotonic() < last_chance):
            return False
        with self._lock:
            return all(server in tried or server.failures for server in self.servers)

    def _choose(self, tried: Sequence[ServerHealth], last_chance: float) -> ServerHealth:
        """The healthy server with the least outstanding, those not tried yet first; wait if all are paused.

        At `last_chance` a paused one is taken, so that a request does not outlive its time by a pause.
        """
        while True:
            with self._lock:
                now = time.monotonic()
                healthy = [server for server in self.servers if server.paused_until <= now]
                if healthy or self._stopped.is_set() or (now >= last_chance and len(tried) > self._max_retries):
                    best = min(healthy or self.servers, key=lambda s: (s in tried, s.outstanding, s.failures))
                    best.outstanding += 1
                    return best
                over = min(server.paused_until for server in self.servers)
            if len(tried) > self._max_retries:
                over = min(over, last_chance)
            self._stopped.wait(max(over - now, 0.01))

    def _release(self, server: ServerHealth, error: BaseException | None) -> None:
        with self._lock:
            server.outstanding -= 1
            failures = server.failures
            if self._stopped.is_set():
                return  # it says nothing about the server
            if error is None:
                server.succeed()
            elif isinstance(error, EagleTargetError) and is_retryable(error) and not is_busy(error):
                server.fail(error)
        if failures and error is None:
            logger.info("%s answers again, after %d failures in a row", server.session.url, failures)
        elif server.failures > failures:
            logger.warning("%s failed, the %d. time in a row: %s", server.session.url, failures + 1, error)

    def _pause(self, server: ServerHealth, error: EagleTargetError) -> None:
        """Leave a busy server alone for as long as it asks; others are asked meanwhile."""
        seconds = getattr(error, "retry_after", None) or BUSY_PAUSE_SECONDS
        with self._lock:
            server.paused_until = time.monotonic() + min(seconds, self._timeout)


def is_retryable(error: EagleTargetError) -> bool:
    """Whether the same request may go well on another server, or later."""
    if isinstance(error, RequestTooLarge):
        return False
    if isinstance(error, ServerError):
        return (
            error.status >= 500
            or error.status == ProblemType.BODY_TIMEOUT.status
            or error.problem == ProblemType.UNKNOWN_VOCAB_MAPPING
        )
    return isinstance(error, TransportError | AdapterError)


def is_outage(error: EagleTargetError) -> bool:
    """Whether the server could not be reached, or not in time, rather than answered wrongly."""
    if isinstance(error, TransportRefused | Overloaded):
        return False
    return isinstance(error, ConnectError | TransferTimeout | Unavailable)


def is_busy(error: EagleTargetError) -> bool:
    """Whether the server is well and only to be waited for.

    Its queue is full; it still loads; or other clients' mappings drive this one's out as soon as it is given.
    """
    if isinstance(error, Overloaded):
        return True
    return isinstance(error, ServerError) and error.problem in (ProblemType.LOADING, ProblemType.UNKNOWN_VOCAB_MAPPING)


def _exhausted(error: EagleTargetError, tried: Sequence[ServerHealth]) -> EagleTargetError:
    urls = [server.session.url for server in tried]
    message = f"{error} (gave up after {len(tried)} attempts, on {', '.join(urls)})"
    if isinstance(error, ServerError):
        return type(error)(message, status=error.status, problem=error.problem, retry_after=error.retry_after)
    return type(error)(message)
