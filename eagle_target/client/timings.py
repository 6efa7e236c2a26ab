"""Where a request's time went, as its client knows it."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, NamedTuple

from eagle_target.protocol import messages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.contract.model_info import TrafficTotals

# The server's stages, then the client's.
STAGES = ("queue", "forward", "projection", "transfer", "assembly")


class Received(NamedTuple):
    """What came of one request: bytes, in the body and beside it, and seconds by stage."""

    nbytes: int
    seconds: dict[str, float]


def received(headers: Mapping[str, str], body_bytes: int, transfer: float) -> Received:
    """Of an answer's headers, and the seconds from their arrival to the last byte."""
    moved = messages.read_count(headers.get(messages.MOVED_BYTES, "")) or 0
    seconds = {**server_seconds(headers.get(messages.TIMINGS, "")), "transfer": transfer}
    return Received(body_bytes + moved, seconds)


def server_seconds(timings: str) -> dict[str, float]:
    """Seconds by stage of a `Server-Timing` header; what is no duration is left out."""
    seconds = {}
    for entry in timings.split(","):
        stage, _, duration = entry.strip().partition(";dur=")
        try:
            given = float(duration)
        except ValueError:
            continue
        if math.isfinite(given):
            seconds[stage] = given / 1000
    return seconds


class Traffic:
    """Sums over the requests of one client. Called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._tokens = self._bytes = 0
        self._seconds = dict.fromkeys(STAGES, 0.0)

    def count(self, tokens: int, answer: Received, assembly: float) -> None:
        """Add one request; `assembly` is seconds from its last byte to the finished batch."""
        with self._lock:
            self._requests += 1
            self._tokens += tokens
            self._bytes += answer.nbytes
            for stage, seconds in {**answer.seconds, "assembly": assembly}.items():
                self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def totals(self, *, retries: int) -> TrafficTotals:
        """The sums as `model_info` tells them."""
        with self._lock:
            return {
                "requests": self._requests,
                "tokens": self._tokens,
                "bytes_received": self._bytes,
                "seconds": dict(self._seconds),
                "retries": retries,
            }
