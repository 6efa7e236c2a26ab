"""How long to wait after failures in a row."""

from __future__ import annotations

# Of a number that goes on growing; no pause that is meant is this many doublings away.
MOST_DOUBLINGS = 64


def backoff(failures: int, *, first: float, longest: float) -> float:
    """Seconds to wait after so many failures in a row: `first`, then twice as long each time, `longest` at most.

    Args:
        failures: 1 and up.
    """
    return min(first * 2.0 ** min(failures - 1, MOST_DOUBLINGS), longest)
