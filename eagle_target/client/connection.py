"""One server, as the client sees it: HTTP requests, and the transport agreed with it."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import weakref
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import urllib3
from urllib3 import exceptions as http_errors
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from eagle_target import protocol
from eagle_target.client.answers import error_of
from eagle_target.errors import ConfigError, ConnectError, ProtocolError, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

READ_BYTES = 1 << 20
CONNECT_SECONDS = 5.0
MAX_JSON_BYTES = 1 << 20


class ServerConnection:
    """HTTP to one server. Called from several threads at a time.

    Args:
        url: `http://host:port`. timeout: seconds one request may take. max_connections: kept open.

    Raises:
        ConfigError: the URL is not `http://host:port`.
    """

    def __init__(self, url: str, *, timeout: float, max_connections: int) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigError(f"{url!r} is not the URL of a server: http://host:port is expected")
        self.url = f"http://{parts.netloc}"
        self._timeout = timeout
        self._closed = False
        self._open: weakref.WeakSet[TrackedConnection] = weakref.WeakSet()
        self._pool = HTTPConnectionPool(parts.hostname, parts.port or 80, maxsize=max_connections, block=False)
        self._pool.ConnectionCls = _tracked(self._open)

    def request(
        self, method: str, path: str, parts: Sequence[memoryview] = (), headers: Mapping[str, str] | None = None
    ) -> ResponseBody:
        """Send a request and return its answer's body, unread.

        Raises:
            ServerError, ContractError, ...: the server answered with a problem.
            ConnectError, TransferTimeout: it could not be reached, or not in time.
        """
        deadline = time.monotonic() + self._timeout
        body = b"".join(parts) if parts or method in ("POST", "PUT") else None
        try:
            answer = self._pool.urlopen(
                method,
                path,
                body=body,
                headers={"Content-Type": protocol.CONTENT_TYPE, **(headers or {})},
                retries=False,
                redirect=False,
                preload_content=False,
                timeout=urllib3.Timeout(connect=min(CONNECT_SECONDS, self._timeout), read=self._timeout),
            )
        except (http_errors.HTTPError, OSError) as error:
            raise self.translate(error) from error
        response = ResponseBody(self, answer, deadline)
        if answer.status >= 400:
            raise error_of(self.url, answer.status, answer.headers, response.read_all(MAX_JSON_BYTES))
        return response

    def request_json(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> bytes:
        """Send JSON, if any, and return the answer's bytes."""
        parts = [] if content is None else [memoryview(json.dumps(dict(content)).encode())]
        return self.request(method, path, parts, {"Content-Type": "application/json"}).read_all(MAX_JSON_BYTES)

    def close(self) -> None:
        """Close every connection; requests under way end with a ConnectError. Safe to call twice."""
        self._closed = True
        for connection in list(self._open):
            connection.abort()
        self._pool.close()

    def translate(self, error: Exception) -> ConnectError | TransferTimeout:
        """The project's error for one of urllib3's."""
        if self._closed:
            return ConnectError(f"the connection to {self.url} was closed by this client")
        if isinstance(error, http_errors.ConnectTimeoutError | http_errors.NewConnectionError):
            return ConnectError(f"cannot connect to {self.url}: {error}: is the server running there?")
        if isinstance(error, http_errors.TimeoutError | TimeoutError):
            return TransferTimeout(
                f"{self.url} did not answer within {self._timeout:g} s: raise timeout, or ask for less"
            )
        return ConnectError(f"the connection to {self.url} broke: {type(error).__name__}: {error}")


class ResponseBody:
    """The body of one answer, read once; the connection goes back to the pool at its end."""

    def __init__(self, server: ServerConnection, answer: urllib3.BaseHTTPResponse, deadline: float) -> None:
        self._server = server
        self._answer = answer
        self._deadline = deadline
        self.headers = answer.headers
        self.content_type = answer.headers.get("Content-Type", "").partition(";")[0]
        self.length = int(answer.headers.get("Content-Length", "0"))
        self._left = self.length
        if not self._left:
            answer.drain_conn()

    def readinto(self, buffer: memoryview) -> None:
        """Fill the whole buffer with the next bytes.

        Raises:
            ConnectError: the body ended or the connection broke. TransferTimeout: the deadline passed.
        """
        filled = 0
        try:
            while filled < len(buffer):
                # urllib3 copies through a buffer of the size asked for: small pieces stay in the cache.
                count = self._answer.readinto(buffer[filled : filled + READ_BYTES])
                if not count:
                    raise http_errors.IncompleteRead(self.length - self._left + filled, self._left - filled)
                filled += count
                self._check_deadline()
        except (http_errors.HTTPError, OSError, ValueError) as error:
            self.close()
            raise self._server.translate(error) from error
        self._left -= filled
        if not self._left:
            self._answer.release_conn()

    def read_all(self, limit: int) -> bytes:
        """Return the rest of a small body.

        Raises:
            ProtocolError: it is larger than `limit` bytes.
        """
        if self._left > limit:
            self.close()
            raise ProtocolError(f"{self._server.url} answered {self._left} bytes where at most {limit} are expected")
        data = bytearray(self._left)
        self.readinto(memoryview(data))
        return bytes(data)

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            self.close()
            raise TransferTimeout(
                f"{self._server.url} sent {self.length - self._left} of {self.length} bytes in time: raise timeout"
            )

    def close(self) -> None:
        """Drop the connection unless the body was read to its end."""
        if self._left:
            self._answer.close()


class TrackedConnection(HTTPConnection):
    """A connection that another thread can cut."""

    def abort(self) -> None:
        """Shut the socket down; whoever waits on it gets an error."""
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


def _tracked(connections: weakref.WeakSet[TrackedConnection]) -> type[TrackedConnection]:
    """A connection class that adds what it makes to a set."""

    class Connection(TrackedConnection):
        def connect(self) -> None:
            super().connect()
            connections.add(self)

    return Connection
