"""The life of a server: its state, what a failure means for it, and whether an engine that died is loaded again."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import torch

from eagle_target.backoff import backoff
from eagle_target.errors import AdapterError, EagleTargetError, EngineDead, EngineStuck, ServerError
from eagle_target.protocol.problems import ProblemType
from eagle_target.server.engine.job import RETRY_SECONDS, Call

if TYPE_CHECKING:
    from eagle_target.contract.runner import TargetRunner
    from eagle_target.contract.target import ServedTarget
    from eagle_target.server.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "degraded", "stuck", "draining", "failed", "closed"]
SERVING_STATES = ("ready", "degraded")

# Requests in a row that failed by themselves, until the engine is tried with tokens that nobody sent.
FAILURES_BEFORE_TRIAL = 3
TRIAL_TOKENS = 2

WINDOW_SECONDS = 3600.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0


class AnotherTarget(AdapterError):
    """What was loaded again is not what was served."""


class Restarts:
    """Hands out restarts, so many within an hour, each after twice the pause of the one before.

    Args:
        most: within an hour; 0 for none.

    Attributes:
        total: handed out so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.total = 0
        self._times: deque[float] = deque()

    @property
    def recent(self) -> int:
        """Of the last hour."""
        while self._times and self._times[0] < time.monotonic() - WINDOW_SECONDS:
            self._times.popleft()
        return len(self._times)

    def take(self) -> float | None:
        """Take one: seconds to wait before it; None where there are no more."""
        taken = self.recent
        if taken >= self.most:
            return None
        self._times.append(time.monotonic())
        self.total += 1
        return backoff(taken + 1, first=FIRST_PAUSE_SECONDS, longest=LONGEST_PAUSE_SECONDS)


class Lifecycle:
    """One server's state; changed and read from any thread.

    Args:
        scheduler: refuses work while there is no engine. restarts: what an engine that died may have.

    Attributes:
        name: see docs/life.md. failure: the last one, until a forward goes well again.
        served: what is served, once it was loaded. loads: how often it was.
        pause: seconds before an engine that died is loaded again; None where it is not.
        ended_by: the kind of failure that the server does not go on after.
    """

    def __init__(self, scheduler: Scheduler, restarts: Restarts) -> None:
        self._scheduler = scheduler
        self._restarts = restarts
        # A request that is refused may ask at once, in the thread that refuses it.
        self._changing = threading.RLock()
        self._is_dead = False
        self._failures = 0
        self.name: State = "loading"
        self.failure: str | None = None
        self.served: ServedTarget | None = None
        self.loads = 0
        self.pause: float | None = None
        self.ended_by: type[AdapterError] | None = None

    @property
    def is_serving(self) -> bool:
        """Whether requests are taken."""
        return self.name in SERVING_STATES and self.ended_by is None

    @property
    def _goes_on(self) -> bool:
        """Whether the server is to serve, now or once it has loaded."""
        return self.name in (*SERVING_STATES, "loading") and self.ended_by is None

    def unavailable(self) -> EagleTargetError:
        """What a request gets that is not taken."""
        reason = f"the server is {self.name}" + (f": {self.failure}" if self.failure else "")
        return ProblemType.named(self.name).error(reason, retry_after=RETRY_SECONDS)

    def loaded(self, served: ServedTarget) -> None:
        """The target is there.

        Raises:
            AnotherTarget: it is not the one that was served before.
        """
        with self._changing:
            if self.served is not None and self.served.fingerprint != served.fingerprint:
                raise AnotherTarget(
                    f"the target that was loaded again is another: fingerprint {served.fingerprint} instead of "
                    f"{self.served.fingerprint} "
                    f"({'; '.join(self.served.differences(served)) or 'the same model and sizes'})"
                )
            self._scheduler.resume()
            self.served = served
            self.loads += 1
            if self.name == "loading":
                self.name, self.failure = "ready", None

    def note(self, failure: Exception | None) -> Exception | None:
        """How a request by itself went; returns what its client gets."""
        if isinstance(failure, EngineDead):
            self.die(failure)
            return self.unavailable()
        with self._changing:
            if self.is_serving:
                self.name = "ready" if failure is None else "degraded"
                self.failure = None if failure is None else f"{type(failure).__name__}: {failure}"
            self._failures = 0 if failure is None else self._failures + 1
            if self._failures >= FAILURES_BEFORE_TRIAL:
                self._failures = 0
                # Where there is no room for the trial, others wait whose requests are one.
                with suppress(ServerError):
                    self._scheduler.put(Call(try_out))
        return failure

    def die(self, error: BaseException) -> None:
        """The engine is gone: refuse what waits, and decide what follows. The first reason stands."""
        with self._changing:
            if self._is_dead:
                return
            self._is_dead = True
            with_traceback = not isinstance(error, EagleTargetError) or logger.isEnabledFor(logging.DEBUG)
            logger.error(
                "the engine stopped: %s: %s", type(error).__name__, error, exc_info=error if with_traceback else None
            )
            reason = str(error) or type(error).__name__
            # A first load that fails is not tried again: its cause is a setting, as a rule.
            if self.served is not None and self._goes_on and not isinstance(error, AnotherTarget):
                self.pause = self._restarts.take()
            if self.pause is not None:
                turn = f"{self._restarts.recent} of {self._restarts.most} within an hour"
                logger.warning("the engine is loaded again in %g s, restart %s", self.pause, turn)
                self.name, self.failure = "loading", f"{reason} (restart {turn})"
                self._scheduler.pause(self.unavailable())
                return
            self._end("failed", reason, AdapterError if self.served is None else EngineDead)
            self._scheduler.close(self.unavailable())

    def revive(self) -> None:
        """The engine is about to be loaded again."""
        with self._changing:
            self._is_dead, self.pause, self._failures = False, None, 0

    def stick(self, failure: str) -> None:
        """The engine is there, but does not return: whoever waits for it gets an answer."""
        with self._changing:
            self._end("stuck", failure, EngineStuck)
            self._scheduler.abandon(self.unavailable())

    def drain(self) -> None:
        """Take no more requests; what is queued is still answered."""
        with self._changing:
            if self._goes_on:
                self.name = "draining"

    def close(self) -> None:
        """Take nothing, for good, and refuse what waits."""
        with self._changing:
            self.name = "closed"
        self._scheduler.close(ProblemType.CLOSED.error("the server is closed"))

    def _end(self, name: State, failure: str, kind: type[AdapterError]) -> None:
        """The server does not go on; the first kind of failure stands."""
        self.failure = failure
        self.ended_by = self.ended_by or kind
        if self.name != "closed":
            self.name = name


def try_out(runner: TargetRunner) -> None:
    """Tell an engine that fails at everything from one that was sent what it cannot do.

    Raises:
        EngineDead: it fails at this, too.
    """
    try:
        ids = torch.zeros(TRIAL_TOKENS, dtype=torch.int64, device=torch.device(runner.info.device))
        forward = runner.forward_eagle3(ids, [TRIAL_TOKENS])
        if forward.logits is None:
            runner.compute_logits(forward.last_hidden_states[:1])
    except Exception as error:
        raise EngineDead(
            f"{FAILURES_BEFORE_TRIAL} requests failed in a row, and so did a trial: {type(error).__name__}: {error}"
        ) from error
