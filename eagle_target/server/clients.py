"""Which clients are connected."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_CLIENTS = 4096
MAX_CLIENT_LETTERS = 64
# Enough of an id to tell clients apart, too little to speak for one.
SHOWN_LETTERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectedClient:
    """A client as others may see it.

    id: the start of its id, or its address. since, last_seen: Unix seconds. requests, tokens: supervised for it.
    transport: of its last supervision; empty before the first.
    """

    id: str
    address: str
    since: float
    last_seen: float
    requests: int
    tokens: int
    transport: str


@dataclass(slots=True, eq=False)
class _Presence:
    """What is known of one client. heard_at: `time.monotonic()` of its last sign of life."""

    address: str
    heard_at: float
    since: float = field(default_factory=time.time)
    under_way: int = 0
    has_left: bool = False
    requests: int = 0
    tokens: int = 0
    transport: str = ""


class Presences:
    """Keeps the clients that are connected.

    A client is connected from its first request on, until it says that it leaves or has been silent for the lease with
    nothing under way. Of most clients only the latest `MAX_CLIENTS` are kept.

    Args:
        lease: seconds.
    """

    def __init__(self, lease: float) -> None:
        self.lease = lease
        self._lock = threading.Lock()
        self._clients: dict[str, _Presence] = {}
        self._most = 0

    @property
    def most_at_a_time(self) -> int:
        """The most clients that were connected together so far."""
        return self._most

    def count(self) -> int:
        """Clients that are connected."""
        with self._lock:
            self._forget_silent()
            return len(self._clients)

    def connected(self) -> list[ConnectedClient]:
        """The clients that are connected, in the order they came."""
        now, clock = time.time(), time.monotonic()
        with self._lock:
            self._forget_silent()
            return [
                ConnectedClient(
                    id=name if name == known.address else name[:SHOWN_LETTERS],
                    address=known.address,
                    since=known.since,
                    last_seen=now - (0.0 if known.under_way else clock - known.heard_at),
                    requests=known.requests,
                    tokens=known.tokens,
                    transport=known.transport,
                )
                for name, known in self._clients.items()
            ]

    def hear(self, client: str, address: str) -> None:
        """A sign of life, which makes a client connected."""
        with self.request(client, address):
            pass

    @contextlib.contextmanager
    def request(self, client: str, address: str, *, connects: bool = True) -> Iterator[None]:
        """A request of a client is under way inside; `connects` unless it only counts for clients that are there."""
        with self._lock:
            known = self._clients.get(client)
            if known is None and connects:
                known = self._add(client, address)
            if known is not None:
                known.under_way += 1
                known.has_left = known.has_left and not connects
        try:
            yield
        finally:
            if known is not None:
                self._end(client, known)

    def supervised(self, client: str, *, tokens: int, transport: str) -> None:
        """Count one answered request of a client, if it is connected."""
        with self._lock:
            known = self._clients.get(client)
            if known is not None:
                known.requests += 1
                known.tokens += tokens
                known.transport = transport

    def leave(self, client: str) -> None:
        """A client says that it leaves; what it has under way may end."""
        with self._lock:
            known = self._clients.get(client)
            if known is not None:
                known.has_left = True
                self._drop_if_gone(client, known)

    def _add(self, client: str, address: str) -> _Presence:
        self._forget_silent()
        if len(self._clients) >= MAX_CLIENTS:
            del self._clients[min(self._clients, key=lambda name: self._clients[name].heard_at)]
        known = self._clients[client] = _Presence(address, time.monotonic())
        self._most = max(self._most, len(self._clients))
        return known

    def _end(self, client: str, known: _Presence) -> None:
        with self._lock:
            known.under_way -= 1
            known.heard_at = time.monotonic()
            self._drop_if_gone(client, known)

    def _drop_if_gone(self, client: str, known: _Presence) -> None:
        if known.has_left and not known.under_way and self._clients.get(client) is known:
            del self._clients[client]

    def _forget_silent(self) -> None:
        oldest = time.monotonic() - self.lease
        for client, known in list(self._clients.items()):
            if not known.under_way and known.heard_at < oldest:
                del self._clients[client]
