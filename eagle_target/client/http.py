"""HTTP to one server: connections whose sockets any thread can cut, answers that are read without a copy."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import xxhash

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
    import ssl
    from collections.abc import Mapping, Sequence

READ_BYTES = 4 << 20
CONNECT_SECONDS = 5.0
MAX_JSON_BYTES = 1 << 20


def shut_down(connected: socket.socket) -> None:
    """End a connection in both directions, from any thread; whoever waits on it gets an error."""
    # Not TLS's own shutdown, which takes the session from under whoever reads.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


class Connection(http.client.HTTPConnection):
    """One connection, over TLS where there is a context for it."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        super().__init__(host, port)
        self._tls = tls
        if tls is not None:
            self.default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        """Connect, and shake hands where there is TLS.

        Raises:
            ConnectError: nobody listens there. OSError: the server does not speak TLS, or its certificate is wrong.
        """
        try:
            super().connect()
        except OSError as error:
            raise ConnectError(f"{error}: is the server running there?") from error
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)

    @property
    def is_idle(self) -> bool:
        """True while the server neither closed the connection nor said anything unasked."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)


class ConnectionPool:
    """The connections to one server: those that wait for a request, and the sockets of all, which any thread can cut.

    Args:
        host, port, tls: where they go. kept: how many may wait.
    """

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, *, kept: int) -> None:
        self._address = (host, port, tls)
        self._kept = kept
        self._lock = threading.Lock()
        self._waiting: list[Connection] = []
        # Not the connections: one lets go of its socket while a last answer is still read from it.
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self.closed = False

    def take(self, timeout: float) -> Connection:
        """A connection for one request, each step of which may take so many seconds.

        Raises:
            ConnectError: nobody listens there. OSError: as `Connection.connect` raises it.
        """
        while True:
            with self._lock:
                connection = self._waiting.pop() if self._waiting else None
            if connection is None:
                connection = self._connect(min(CONNECT_SECONDS, timeout))
            elif not connection.is_idle:
                connection.close()
                continue
            connection.sock.settimeout(timeout)
            return connection

    def give_back(self, connection: Connection) -> None:
        """The connection's answer was read to its end."""
        with self._lock:
            if connection.sock is not None and len(self._waiting) < self._kept and not self.closed:
                self._waiting.append(connection)
                return
        connection.close()

    def cut(self) -> None:
        """Shut every socket down; whoever waits on one gets an error, and so does who connects from now on."""
        with self._lock:
            self.closed = True
            waiting, self._waiting = self._waiting, []
            for connected in self._sockets:
                shut_down(connected)
        for connection in waiting:
            connection.close()

    def _connect(self, timeout: float) -> Connection:
        connection = Connection(*self._address)
        connection.timeout = timeout
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._sockets.add(connection.sock)
            if self.closed:
                shut_down(connection.sock)
        return connection


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
        tls = self._access.tls if parts.scheme == "https" else None
        # One more for what the lease's thread sends beside the requests.
        self._pool = ConnectionPool(parts.hostname, port, tls, kept=max_connections + 1)

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
        headers = {
            "Content-Type": messages.CONTENT_TYPE,
            **({} if body is None else {messages.CHECKSUM: messages.checksum_of([body])}),
            **self._headers,
            **self._access.headers(),
            **(headers or {}),
        }
        try:
            connection = self._pool.take(timeout)
        except (ConnectError, OSError) as error:
            raise self.translate(error) from error
        try:
            # A server that refuses a body answers before it has read it, and may hang up on the rest.
            with contextlib.suppress(BrokenPipeError):
                connection.request(method, path, body, headers)
            answer = connection.getresponse()
            response = ResponseBody(self, self._pool, connection, answer, deadline)
        except (http.client.HTTPException, OSError, ValueError) as error:
            # A ValueError is of a channel's name that no header or path can carry.
            connection.close()
            raise self.translate(error) from error
        except BaseException:
            connection.close()
            raise
        if answer.status >= 300:
            raise read_problem(self.url, answer.status, response.headers, response.read_all(MAX_JSON_BYTES))
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
        self._pool.cut()

    def translate(self, error: Exception) -> ConnectError | TransferTimeout:
        """The project's error for what a connection raised."""
        if self._pool.closed:
            return ConnectError(f"the connection to {self.url} was closed by this client")
        if isinstance(error, ConnectError):
            return ConnectError(f"cannot connect to {self.url}: {error}")
        if isinstance(error, TimeoutError):
            return TransferTimeout(
                f"{self.url} did not answer within {self._timeout:g} s: raise timeout, or ask for less"
            )
        return ConnectError(f"the connection to {self.url} broke: {type(error).__name__}: {error}")


class ResponseBody:
    """The body of one answer, read once; the connection goes back to the pool at its end."""

    def __init__(
        self,
        server: ServerConnection,
        pool: ConnectionPool,
        connection: Connection,
        answer: http.client.HTTPResponse,
        deadline: float,
    ) -> None:
        self._server = server
        self._pool = pool
        self._connection = connection
        self._answer = answer
        self.deadline = deadline
        # Case does not matter in its names.
        self.headers = cast("Mapping[str, str]", answer.headers)
        self.content_type = answer.headers.get("Content-Type", "").partition(";")[0]
        self.length = self._left = _content_length(answer)
        self._checksum = Checksum(server.has_checksums)
        self._has_ended = False
        self._end_if_read()

    def readinto(self, buffer: memoryview) -> None:
        """Fill the whole buffer with the next bytes.

        Raises:
            ConnectError: the body ended or the connection broke. TransferTimeout: the deadline passed.
        """
        filled = 0
        try:
            while filled < len(buffer):
                count = self._answer.readinto(buffer[filled : filled + READ_BYTES])
                if not count:
                    raise http.client.IncompleteRead(b"", self._left - filled)
                self._checksum.update(buffer[filled : filled + count])
                filled += count
                self._check_deadline()
        except (http.client.HTTPException, OSError, ValueError) as error:
            self.close()
            raise self._server.translate(error) from error
        self._left -= filled
        self._end_if_read()

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

    def close(self) -> None:
        """Drop the connection unless the body was read to its end."""
        if self._left:
            self._answer.close()
            self._connection.close()

    def _end_if_read(self) -> None:
        # Once: what is read of nothing more must not hand a connection back that somebody else has by now.
        if self._left or self._has_ended:
            return
        self._has_ended = True
        self._answer.close()
        if self._answer.chunked:
            self._connection.close()  # the end of the chunks was not read
        else:
            self._pool.give_back(self._connection)

    def _check_deadline(self) -> None:
        if time.monotonic() > self.deadline:
            self.close()
            raise TransferTimeout(
                f"{self._server.url} sent {self.length - self._left} of {self.length} bytes in time: raise timeout"
            )


def _content_length(answer: http.client.HTTPResponse) -> int:
    """Bytes of an answer's body; an error page's may be left out, by something between the server and us.

    Raises:
        ProtocolError: no length, or none that is a number, where there is something to read.
    """
    text = answer.headers.get("Content-Length", "")
    length = messages.read_count(text)
    if length is not None:
        return length
    if text or not (answer.status == http.client.NO_CONTENT or answer.status >= 300):
        answer.close()
        raise ProtocolError(f"the answer, status {answer.status}, has Content-Length {text!r}: a number is expected")
    return 0
