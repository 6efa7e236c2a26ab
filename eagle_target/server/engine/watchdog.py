"""Notices calls of an engine that do not return, and says where every thread was."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.server.engine.lifecycle import Lifecycle

logger = logging.getLogger(__name__)

CHECKS_A_TIMEOUT = 20
LONGEST_CHECK_SECONDS = 1.0


class Watchdog:
    """Times calls of an engine, on whichever threads they are made.

    Args:
        timeout: seconds one may take; 0 for any number. lifecycle: told, once, of one that does not return.

    Attributes:
        stuck: calls that took too long so far.
    """

    def __init__(self, timeout: float, lifecycle: Lifecycle) -> None:
        self._timeout = timeout
        self._lifecycle = lifecycle
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._calls: dict[int, tuple[str, str, float]] = {}
        self._ended = threading.Event()
        self.stuck = 0

    def start(self) -> None:
        """Watch from now on."""
        if self._timeout:
            threading.Thread(target=self._run, name="eagle-target-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no more. Safe to call twice."""
        self._ended.set()

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Time what is called inside."""
        number = next(self._numbers)
        with self._lock:
            self._calls[number] = (what, threading.current_thread().name, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                del self._calls[number]

    def _run(self) -> None:
        while not self._ended.wait(min(self._timeout / CHECKS_A_TIMEOUT, LONGEST_CHECK_SECONDS)):
            latest = time.monotonic() - self._timeout
            with self._lock:
                late = [(what, thread) for what, thread, began in self._calls.values() if began < latest]
            if late:
                what, thread = late[0]
                self.stuck += 1
                logger.critical(
                    "%s did not return within %g s (forward_timeout); every thread's stack:\n%s",
                    what,
                    self._timeout,
                    describe_threads(first=thread),
                )
                self._lifecycle.stick(f"{what} did not return within {self._timeout:g} s (forward_timeout)")
                return


def describe_threads(first: str) -> str:
    """Where every thread is, source lines without values; the named one first."""
    frames = sys._current_frames()  # noqa: SLF001 - the only way to another thread's frame
    threads = sorted(threading.enumerate(), key=lambda thread: thread.name != first)
    shown = []
    for thread in threads:
        frame = frames.get(thread.ident or 0)
        if frame is not None:
            shown.append(f"thread {thread.name}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(shown).rstrip()
