"""How much finished supervision waits for its clients: bounded for each client, and for all of them."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass

from eagle_target.protocol.problems import ProblemType


@dataclass(slots=True, eq=False)
class Claim:
    """Room for one answer, until it is released."""

    outbox: Outbox
    client: str
    nbytes: int
    is_released: bool = False

    def release(self) -> None:
        """Give the room back. Safe to call twice."""
        self.outbox.take_back(self)


class Outbox:
    """Counts the bytes of answers from before their forward until they are sent, or given up.

    Args:
        max_bytes: of all clients' answers. max_client_bytes: of one client's.

    Attributes:
        changed: notified whenever there is more room.
    """

    def __init__(self, max_bytes: int, max_client_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_client_bytes = max_client_bytes
        self._clients: Counter[str] = Counter()
        self._total = 0
        # Room may come back anywhere, in a thread that holds this lock as well, and in the middle of a count: what a
        # claim held is taken off at the next count.
        self.changed = threading.Condition(threading.RLock())
        self._returned: deque[Claim] = deque()
        self.peak_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes that are claimed."""
        with self.changed:
            self._settle()
            return self._total

    def check(self, nbytes: int) -> None:
        """Refuse an answer that there will never be room for.

        Raises:
            RequestTooLarge: with the bytes, the limit and the options that raise it.
        """
        limits = {"max_client_outbox_bytes": self._max_client_bytes, "max_outbox_bytes": self._max_bytes}
        option, limit = min(limits.items(), key=lambda item: item[1])
        if nbytes > limit:
            raise ProblemType.ANSWER_TOO_LARGE.error(
                f"the answer takes {nbytes} bytes, this server keeps {limit} for a client: send fewer rows a batch, "
                f"ask for a smaller encoding, or raise {option}"
            )

    def claim(self, client: str, nbytes: int) -> Claim | None:
        """Take room for an answer; None where there is none now."""
        with self.changed:
            self._settle()
            if self._clients[client] + nbytes > self._max_client_bytes or self._total + nbytes > self._max_bytes:
                return None
            self._clients[client] += nbytes
            self._total += nbytes
            self.peak_bytes = max(self.peak_bytes, self._total)
        return Claim(self, client, nbytes)

    def take_back(self, claim: Claim) -> None:
        """Have the room of a claim again, which is released with it."""
        with self.changed:
            if not claim.is_released:
                claim.is_released = True
                self._returned.append(claim)
                self.changed.notify_all()

    def _settle(self) -> None:
        while self._returned:
            claim = self._returned.popleft()
            self._total -= claim.nbytes
            self._clients[claim.client] -= claim.nbytes
            if not self._clients[claim.client]:
                del self._clients[claim.client]
