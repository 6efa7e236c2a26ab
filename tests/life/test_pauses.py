"""How restarts are counted out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from eagle_target.server.engine import lifecycle
from eagle_target.server.engine.lifecycle import Restarts

if TYPE_CHECKING:
    import pytest


def test_pauses_double_and_restarts_come_back_after_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(lifecycle, "FIRST_PAUSE_SECONDS", 1.0)
    few = Restarts(8)
    assert [few.take() for _ in range(10)] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, None, None]
    now += lifecycle.WINDOW_SECONDS + 1
    assert (few.recent, few.take(), few.total) == (0, 1.0, 9)
