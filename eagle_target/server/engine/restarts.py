"""How often an engine that died is loaded again, and after which pause."""

from __future__ import annotations

import time
from collections import deque

WINDOW_SECONDS = 3600.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0


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
        return min(FIRST_PAUSE_SECONDS * 2.0**taken, LONGEST_PAUSE_SECONDS)
