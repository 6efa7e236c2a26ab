"""How much finished supervision waits for its clients: bounded for each client, and for all of them."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from typing import TYPE_CHECKING

from eagle_target.errors import RequestTooLarge

if TYPE_CHECKING:
    from collections.abc import Callable


class Claim:
    """Room for one answer. It is given back when nothing refers to the claim any more."""

    __slots__ = ("__weakref__",)


class Outbox:
    """Counts the bytes of answers from before their forward until they are sent, or given up.

    Args:
        max_bytes: of all clients' answers. max_client_bytes: of one client's.
    """

    def __init__(self, max_bytes: int, max_client_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_client_bytes = max_client_bytes
        self._clients: Counter[str] = Counter()
        self._total = 0
        # A claim may end anywhere, in the middle of a count as well: what it held is taken off at the next count.
        self._returned: deque[tuple[str, int]] = deque()
        self._lock = threading.Lock()
        self._on_room: Callable[[], None] | None = None
        self.peak_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes that are claimed."""
        with self._lock:
            self._settle()
            return self._total

    def watch(self, on_room: Callable[[], None]) -> None:
        """Have a function called, from any thread, whenever there is more room."""
        self._on_room = on_room

    def check(self, nbytes: int) -> None:
        """Refuse an answer that there will never be room for.

        Raises:
            RequestTooLarge: with the bytes, the limit and the options that raise it.
        """
        limits = {"max_client_outbox_bytes": self._max_client_bytes, "max_outbox_bytes": self._max_bytes}
        option, limit = min(limits.items(), key=lambda item: item[1])
        if nbytes > limit:
            raise RequestTooLarge(
                f"the answer takes {nbytes} bytes, this server keeps {limit} for a client: send fewer rows a batch, "
                f"ask for a smaller encoding, or raise {option}",
                status=413,
                problem="answer-too-large",
            )

    def claim(self, client: str, nbytes: int) -> Claim | None:
        """Take room for an answer; None where there is none now."""
        with self._lock:
            self._settle()
            if self._clients[client] + nbytes > self._max_client_bytes or self._total + nbytes > self._max_bytes:
                return None
            self._clients[client] += nbytes
            self._total += nbytes
            self.peak_bytes = max(self.peak_bytes, self._total)
        claim = Claim()
        weakref.finalize(claim, self._give_back, client, nbytes).atexit = False
        return claim

    def _give_back(self, client: str, nbytes: int) -> None:
        self._returned.append((client, nbytes))
        if self._on_room is not None:
            self._on_room()

    def _settle(self) -> None:
        while self._returned:
            client, nbytes = self._returned.popleft()
            self._total -= nbytes
            self._clients[client] -= nbytes
            if not self._clients[client]:
                del self._clients[client]


def follow(claim: Claim, held: object) -> None:
    """Keep a claim for as long as something that can be referred to weakly lives."""
    weakref.finalize(held, _let_go, claim).atexit = False


def _let_go(claim: Claim) -> None:
    """The claim was an argument of the finalizer, which is gone now."""
    del claim
