"""Which clients are connected, how a client says so, and whose requests pass."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

from eagle_target.protocol import messages
from eagle_target.server.bodies import CheckedJson

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send


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


class PresenceGate:
    """An ASGI application that notes whose requests pass; probes and scrapers are no clients.

    Args:
        app: what answers. presences: where clients are noted.
    """

    def __init__(self, app: ASGIApp, presences: Presences) -> None:
        self._app = app
        self._presences = presences

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it as its client's sign of life."""
        path, address = scope["path"], address_of(scope)
        client = header_of(scope, messages.CLIENT)
        if not client and path == messages.SUPERVISION:
            client = address
        if not client or not path.startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        # What a client sends while it ends must not make it one that is there.
        connects = not path.startswith((messages.CLIENTS, messages.TRANSPORTS)) or scope["method"] == "POST"
        with self._presences.request(client[:MAX_CLIENT_LETTERS], address, connects=connects):
            await self._app(scope, receive, send)


def address_of(scope: Scope) -> str:
    """The address a request comes from."""
    return scope["client"][0] if scope.get("client") else ""


def own_address_of(scope: Scope) -> str:
    """The address of this machine that a request's connection came in at."""
    return scope["server"][0] if scope.get("server") else ""


def header_of(scope: Scope, name: str) -> str:
    """A request's header; empty where it has none."""
    wanted = name.lower().encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == wanted), "")


def client_routes(presences: Presences) -> list[Route]:
    """Renew and end a client's presence."""

    async def renew(request: Request) -> Response:
        presences.hear(_client_of(request), address_of(request.scope))
        return CheckedJson({"lease_seconds": presences.lease})

    async def leave(request: Request) -> Response:
        presences.leave(_client_of(request))
        return Response(status_code=204)

    path = messages.CLIENTS + "/{client}"
    return [Route(path, renew, methods=["PUT"]), Route(path, leave, methods=["DELETE"])]


def _client_of(request: Request) -> str:
    return str(request.path_params["client"])[:MAX_CLIENT_LETTERS]
