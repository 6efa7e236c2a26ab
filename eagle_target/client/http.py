"""HTTP to one server: connections whose sockets any thread can cut, answers that are read without a copy."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import urllib3
import xxhash
from urllib3 import exceptions as http_errors
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from eagle_target.auth import Access
from eagle_target.errors import (
    ConfigError,
    ConnectError,
    ProtocolError,
    TransferTimeout,
)
from eagle_target.protocol import messages
from eagle_target.protocol.problems import read_problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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


def shut_down(connected: socket.socket) -> None:
    """End a connection in both directions, from any thread; whoever waits on it gets an error."""
    # Not TLS's own shutdown, which takes the session from under whoever reads.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


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
    """A connection class that tells of the sockets it opens."""

    class Connection(kind):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            # Not the connection: it lets go of its socket while a last answer is still read from it.
            sockets.add(self.sock)

    return Connection


class Checksum:
    """The checksum of a body as it is read; nothing at all where none was asked for."""

    def __init__(self, is_wanted: bool) -> None:
        self._state = xxhash.xxh3_64() if is_wanted else None

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        if self._state is not None:
            self._state.update(data)

    def check(self, url: str, announced: str | None, left: int) -> None:
        """Compare with what the server at `url` announced; `left` bytes of the body were not read.

        Raises:
            ProtocolError: they differ, none was announced, or something is left.
        """
        if self._state is None:
            return
        if left:
            raise ProtocolError(f"{url} sent {left} bytes more than the transfer has")
        expected = f"{messages.CHECKSUM_NAME}={self._state.hexdigest()}"
        if announced != expected:
            raise ProtocolError(
                f"{url} announced checksum {announced!r}, the body that came has {expected!r}: it changed on its way"
            )


READ_BYTES = 4 << 20
CONNECT_SECONDS = 5.0
MAX_JSON_BYTES = 1 << 20


class ServerConnection:
    """HTTP to one server. Called from several threads at a time.

    Args:
        url: `http://host:port` or `https://...`. timeout: seconds one request may take. max_connections: kept open.
        client_id: whose requests these are; empty for nobody's in particular.
        access: token and certificates. checksum: whether answers of tensors are asked to come with one.

    Raises:
        ConfigError: the URL is not `http://host:port`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        max_connections: int,
        client_id: str = "",
        access: Access | None = None,
        checksum: bool = True,
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ConfigError(f"{url!r} is not the URL of a server: {error}: http://host:port is expected") from error
        if "@" in parts.netloc:
            raise ConfigError("the URL of a server holds no password: give a token, or token_file")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigError(f"{url!r} is not the URL of a server: http://host:port is expected")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.client_id = client_id
        self._timeout = timeout
        self._headers = {messages.CLIENT: client_id} if client_id else {}
        self.has_checksums = checksum
        if checksum:
            self._headers[messages.WANT_CHECKSUM] = messages.CHECKSUM_NAME
        self._access = access or Access()
        self._sockets = OpenSockets()
        # One more for what the lease's thread sends beside the requests.
        kept = max_connections + 1
        self._pool: HTTPConnectionPool
        if parts.scheme == "https":
            self._pool = HTTPSConnectionPool(
                parts.hostname, port, maxsize=kept, block=False, ssl_context=self._access.tls
            )
            self._pool.ConnectionCls = tracked(SecureConnection, self._sockets)
        else:
            self._pool = HTTPConnectionPool(parts.hostname, port, maxsize=kept, block=False)
            self._pool.ConnectionCls = tracked(DirectConnection, self._sockets)

    def request(
        self,
        method: str,
        path: str,
        parts: Sequence[memoryview] = (),
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float | None = None,
    ) -> ResponseBody:
        """Send a request and return its answer's body, unread.

        Args:
            timeout: where this one may take less.

        Raises:
            ServerError, ContractError, ...: the server answered with a problem.
            ConnectError, TransferTimeout: it could not be reached, or not in time.
        """
        timeout = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        body = b"".join(parts) if parts or method in ("POST", "PUT") else None
        try:
            answer = self._pool.urlopen(
                method,
                path,
                body=body,
                headers={
                    "Content-Type": messages.CONTENT_TYPE,
                    **({} if body is None else {messages.CHECKSUM: messages.checksum_of([body])}),
                    **self._headers,
                    **self._access.headers(),
                    **(headers or {}),
                },
                retries=False,
                redirect=False,
                preload_content=False,
                timeout=urllib3.Timeout(connect=min(CONNECT_SECONDS, timeout), read=timeout),
            )
        except (http_errors.HTTPError, OSError) as error:
            raise self.translate(error) from error
        response = ResponseBody(self, answer, deadline)
        if answer.status >= 300:
            raise read_problem(self.url, answer.status, answer.headers, response.read_all(MAX_JSON_BYTES))
        return response

    def request_json(
        self, method: str, path: str, content: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> bytes:
        """Send JSON, if any, and return the answer's bytes."""
        parts = [] if content is None else [memoryview(json.dumps(dict(content)).encode())]
        answer = self.request(method, path, parts, {"Content-Type": "application/json"}, timeout=timeout)
        data = answer.read_all(MAX_JSON_BYTES)
        if messages.CHECKSUM in answer.headers:
            answer.check()
        return data

    def close(self) -> None:
        """Close every connection; requests under way end with a ConnectError. Safe to call twice."""
        self._sockets.cut()
        self._pool.close()

    def translate(self, error: Exception) -> ConnectError | TransferTimeout:
        """The project's error for one of urllib3's."""
        if self._sockets.closed:
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
        self.deadline = deadline
        self.headers = answer.headers
        self.content_type = answer.headers.get("Content-Type", "").partition(";")[0]
        self.length = self._left = _content_length(answer)
        self._source = source_of(answer)
        self._checksum = Checksum(server.has_checksums)
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
                count = self._source.readinto(buffer[filled : filled + READ_BYTES])
                if not count:
                    raise http_errors.IncompleteRead(self.length - self._left + filled, self._left - filled)
                self._checksum.update(buffer[filled : filled + count])
                filled += count
                self._check_deadline()
        except (http_errors.HTTPError, OSError, ValueError) as error:
            self.close()
            raise self._server.translate(error) from error
        self._left -= filled
        if not self._left:
            self._answer.release_conn()

    def check(self) -> None:
        """Compare the whole body's checksum with the one the server sent, which must be there if it was asked for.

        Raises:
            ProtocolError: they differ, or there is none, or the body was not read to its end.
        """
        self._checksum.check(self._server.url, self.headers.get(messages.CHECKSUM), self._left)

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
        if time.monotonic() > self.deadline:
            self.close()
            raise TransferTimeout(
                f"{self._server.url} sent {self.length - self._left} of {self.length} bytes in time: raise timeout"
            )

    def close(self) -> None:
        """Drop the connection unless the body was read to its end."""
        if self._left:
            self._answer.close()


def _content_length(answer: urllib3.BaseHTTPResponse) -> int:
    """Bytes of an answer's body; an error page's may be left out, by something between the server and us.

    Raises:
        ProtocolError: no length, or none that is a number, where there is something to read.
    """
    text = answer.headers.get("Content-Length", "")
    length = messages.read_count(text)
    if length is not None:
        return length
    without_body = answer.status == 204 or answer.status >= 300
    answer.close()
    if text or not without_body:
        raise ProtocolError(f"the answer, status {answer.status}, has Content-Length {text!r}: a number is expected")
    return 0
