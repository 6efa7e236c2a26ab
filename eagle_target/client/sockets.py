"""Connections whose sockets any thread can cut, and whose answers are read without a copy."""

from __future__ import annotations

import http.client
import threading
import weakref
from typing import TYPE_CHECKING, Any

from urllib3.connection import HTTPConnection, HTTPSConnection

from eagle_target.client.errands import present_errand, shut_down

if TYPE_CHECKING:
    import socket

    import urllib3


class OpenSockets:
    """The sockets to one server, which any thread can cut."""

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.closed = False

    def add(self, connected: socket.socket) -> None:
        """Keep a socket in sight for as long as it is open; after `cut` it is cut at once."""
        with self._lock:
            self._sockets.add(connected)
            if self.closed:
                shut_down(connected)

    def cut(self) -> None:
        """Shut every socket down; whoever waits on one gets an error."""
        with self._lock:
            self.closed = True
            for connected in self._sockets:
                shut_down(connected)


class _KeepsAnswer:
    """Keeps http.client's own object behind a connection's last answer.

    That reads from the socket straight into a buffer, where urllib3's `readinto` makes a bytes object and copies it.
    """

    answer: http.client.HTTPResponse | None = None

    def response_class(self, *args: Any, **options: Any) -> http.client.HTTPResponse:
        """Make the answer; http.client calls this where it has a class by default."""
        self.answer = http.client.HTTPResponse(*args, **options)
        return self.answer


class DirectConnection(_KeepsAnswer, HTTPConnection):  # type: ignore[misc]
    """A connection whose answers are read without a copy."""


class SecureConnection(_KeepsAnswer, HTTPSConnection):  # type: ignore[misc]
    """The same over TLS."""


def source_of(answer: urllib3.BaseHTTPResponse) -> http.client.HTTPResponse | urllib3.BaseHTTPResponse:
    """Where to read an answer's body from with the fewest copies."""
    connection = answer.connection
    direct = connection.answer if isinstance(connection, _KeepsAnswer) else None
    return answer if direct is None else direct


def tracked(kind: type[Any], sockets: OpenSockets) -> type[Any]:
    """A connection class that tells of the sockets it opens and of whose errand they are used for."""

    class Connection(kind):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            # Not the connection: it lets go of its socket while a last answer is still read from it.
            sockets.add(self.sock)
            present_errand().hold(self.sock)

        def request(self, *args: Any, **options: Any) -> None:
            if self.sock is not None:
                present_errand().hold(self.sock)
            super().request(*args, **options)

    return Connection
