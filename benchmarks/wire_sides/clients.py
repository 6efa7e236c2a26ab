"""What every client does: ask for batches one after another and time each, from the request to the finished batch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def time_batches(generate: Callable[[], Any], *, count: int, hold: int) -> list[float]:
    """Seconds of each batch.

    Args:
        generate: returns a finished batch. count: batches to ask for.
        hold: batches that stay alive while the next is asked for; 0 for a loop that lets go of each first, 1 for one
            that prefetches one ahead.
    """
    held: list[Any] = []
    seconds = []
    for _ in range(count):
        del held[: max(0, len(held) - hold)]
        started = time.perf_counter()
        held.append(generate())
        seconds.append(time.perf_counter() - started)
    return seconds
