"""Requests that take long are asked for once more, on another server; the first right answer is taken."""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from eagle_target.client.balancer import is_retryable
from eagle_target.client.cancellation import Errand
from eagle_target.errors import EagleTargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.client.balancer import Dispatcher
    from eagle_target.client.session import Peer

Answer = TypeVar("Answer")


class Attempt(Generic[Answer]):
    """A request under way on a thread of its own, for it may have to be left behind."""

    def __init__(self, work: Callable[[], Answer]) -> None:
        self.errand = Errand()
        self.future: Future[Answer] = Future()
        self._work = work
        self.thread = threading.Thread(target=self._run, name="eagle-target-attempt", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self.errand.under_way():
                answer = self._work()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self.future.set_exception(error)
        else:
            self.future.set_result(answer)

    @property
    def is_right(self) -> bool:
        """Whether it ended with an answer."""
        return self.future.exception() is None

    @property
    def settles_it(self) -> bool:
        """Whether what came of it is the request's outcome: an answer, or an error that others would meet, too."""
        error = self.future.exception()
        return not (isinstance(error, EagleTargetError) and is_retryable(error))


class Hedging(Generic[Answer]):
    """Runs requests with at most one hedge each.

    Args:
        dispatcher: chooses servers. after: seconds without an answer until a hedge is made.
        forget: told of each attempt whose answer is not wanted, when it has ended.
    """

    def __init__(self, dispatcher: Dispatcher, after: float, forget: Callable[[Errand, Future[Answer]], None]) -> None:
        self._dispatcher = dispatcher
        self._after = after
        self._forget = forget
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self.hedges = 0
        self.won = 0

    def run(self, operation: Callable[[Peer], Answer]) -> Answer:
        """Run an operation as `Dispatcher.run` does, with a hedge where that takes long.

        Raises:
            EagleTargetError: that of the first attempt, where both fail.
        """
        attempts = [self._start(partial(self._dispatcher.run, operation))]
        winner: Attempt[Answer] | None = None
        try:
            attempts += self._hedge(attempts[0], operation)
            winner = _first_right(attempts)
            return winner.future.result()
        finally:
            self._settle(attempts, winner)

    def join(self) -> None:
        """Wait for attempts that were left behind; the servers' connections are closed."""
        with self._lock:
            threads = [*self._threads]
        for thread in threads:
            thread.join()

    def _hedge(self, first: Attempt[Answer], operation: Callable[[Peer], Answer]) -> list[Attempt[Answer]]:
        """The second attempt, once there is a server for it; none if the first ended before."""
        while not wait([first.future], self._after).done:
            slow = first.errand.standing
            spare = None if slow is None else self._dispatcher.take_spare(slow)
            if spare is not None:
                with self._lock:
                    self.hedges += 1
                return [self._start(partial(self._dispatcher.run_on, spare, operation))]
        return []

    def _settle(self, attempts: Sequence[Attempt[Answer]], winner: Attempt[Answer] | None) -> None:
        for attempt in attempts:
            if attempt is not winner:
                attempt.errand.give_up()
                attempt.future.add_done_callback(partial(self._forget, attempt.errand))
        slow = attempts[0].errand.standing
        if winner is not None and winner is not attempts[0] and winner.is_right and slow is not None:
            self._dispatcher.lose(slow, self._after)
            with self._lock:
                self.won += 1

    def _start(self, work: Callable[[], Answer]) -> Attempt[Answer]:
        attempt = Attempt(work)
        with self._lock:
            self._threads = {thread for thread in self._threads if thread.is_alive()} | {attempt.thread}
        return attempt


def _first_right(attempts: Sequence[Attempt[Answer]]) -> Attempt[Answer]:
    """The first attempt whose outcome is the request's; where all fail, the first one made."""
    waiting = {attempt.future for attempt in attempts}
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for attempt in attempts:
            if attempt.future in done and attempt.settles_it:
                return attempt
    return attempts[0]
