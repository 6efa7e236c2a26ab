"""A server whose wall clock jumps, as one does that is set while a run is under way."""

from __future__ import annotations

import contextlib
import datetime
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.processes import CONTEXT, ServerUnderFault, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from multiprocessing.sharedctypes import Synchronized

DAY = 86_400.0


def jumping(offset: Callable[[], float], patch: pytest.MonkeyPatch) -> None:
    """Everything this process asks for the time of day is off by so many seconds."""
    now, now_ns = time.time, time.time_ns

    class Datetime(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Datetime:
            return cls.fromtimestamp(time.time(), tz)

    patch.setattr(time, "time", lambda: now() + offset())
    patch.setattr(time, "time_ns", lambda: now_ns() + int(offset() * 1e9))
    patch.setattr(datetime, "datetime", Datetime)


def _serve_with_clock(offset: Synchronized[float], settings: Mapping[str, Any], runner: Mapping[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        jumping(lambda: offset.value, patch)
        serve(settings, runner)


class ServerWithClock(ServerUnderFault):
    """A server whose time of day a test moves by setting `offset.value`, in seconds."""

    def __init__(self, runner: Mapping[str, Any] | None = None, **settings: Any) -> None:
        self.offset: Synchronized[float] = CONTEXT.Value("d", 0.0)
        super().__init__(runner, **settings)

    def program(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return _serve_with_clock, (self.offset,)


@contextlib.contextmanager
def server_with_clock(runner: Mapping[str, Any] | None = None, **settings: Any) -> Iterator[ServerWithClock]:
    server = ServerWithClock(runner, **settings)
    try:
        yield server
    finally:
        server.kill()
        server.process.close()
