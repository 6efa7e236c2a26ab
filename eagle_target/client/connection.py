"""One server, as the client sees it: HTTP requests, and the transport agreed with it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import urllib3
from urllib3 import exceptions as http_errors
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from eagle_target import protocol
from eagle_target.client.access import Access
from eagle_target.client.answers import error_of
from eagle_target.client.checksums import Checksum
from eagle_target.client.errands import Errand
from eagle_target.client.presence import Presence
from eagle_target.client.sockets import DirectConnection, OpenSockets, SecureConnection, source_of, tracked
from eagle_target.errors import ConfigError, ConnectError, ProtocolError, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

READ_BYTES = 4 << 20
CONNECT_SECONDS = 5.0
MAX_JSON_BYTES = 1 << 20


class ServerConnection:
    """HTTP to one server. Called from several threads at a time.

    Args:
        url: `http://host:port` or `https://...`. timeout: seconds one request may take. max_connections: kept open.
        client_id: whose requests these are; the server is told that this client is there, and when it leaves.
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
        self._timeout = timeout
        self._headers = {protocol.CLIENT: client_id} if client_id else {}
        self.has_checksums = checksum
        if checksum:
            self._headers[protocol.WANT_CHECKSUM] = protocol.CHECKSUM_NAME
        self._access = access or Access()
        self._presence = Presence(self, client_id) if client_id else None
        self._sockets = OpenSockets()
        # One more for what threads of this client send beside the requests: renewals of its presence and leases.
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
        errand: Errand | None = None,
    ) -> ResponseBody:
        """Send a request and return its answer's body, unread.

        Args:
            timeout: where this one may take less. errand: whose it is, if it may be given up.

        Raises:
            ServerError, ContractError, ...: the server answered with a problem.
            ConnectError, TransferTimeout: it could not be reached, or not in time.
        """
        timeout = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        errand = errand or Errand()
        body = b"".join(parts) if parts or method in ("POST", "PUT") else None
        try:
            with errand.under_way():
                answer = self._pool.urlopen(
                    method,
                    path,
                    body=body,
                    headers={
                        "Content-Type": protocol.CONTENT_TYPE,
                        **({} if body is None else {protocol.CHECKSUM: protocol.checksum_of([body])}),
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
        response = ResponseBody(self, answer, deadline, errand)
        if answer.status >= 300:
            raise error_of(self.url, answer.status, answer.headers, response.read_all(MAX_JSON_BYTES))
        if self._presence is not None:
            self._presence.begin()
        return response

    def request_json(
        self, method: str, path: str, content: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> bytes:
        """Send JSON, if any, and return the answer's bytes."""
        parts = [] if content is None else [memoryview(json.dumps(dict(content)).encode())]
        answer = self.request(method, path, parts, {"Content-Type": "application/json"}, timeout=timeout)
        data = answer.read_all(MAX_JSON_BYTES)
        if protocol.CHECKSUM in answer.headers:
            answer.check()
        return data

    def close(self) -> None:
        """Take leave and close every connection; requests under way end with a ConnectError. Safe to call twice."""
        if self._presence is not None:
            self._presence.end()
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

    def __init__(
        self, server: ServerConnection, answer: urllib3.BaseHTTPResponse, deadline: float, errand: Errand
    ) -> None:
        self._server = server
        self._answer = answer
        self.deadline = deadline
        self.headers = answer.headers
        self.content_type = answer.headers.get("Content-Type", "").partition(";")[0]
        self.length = self._left = _content_length(answer)
        self._source = source_of(answer)
        self._checksum = Checksum(server.has_checksums)
        self._errand = errand
        if not self._left:
            self._errand.let_go()
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
                self._errand.nbytes += count
                self._check_deadline()
        except (http_errors.HTTPError, OSError, ValueError) as error:
            self.close()
            raise self._server.translate(error) from error
        self._left -= filled
        if not self._left:
            self._errand.let_go()
            self._answer.release_conn()

    def check(self) -> None:
        """Compare the whole body's checksum with the one the server sent, which must be there if it was asked for.

        Raises:
            ProtocolError: they differ, or there is none, or the body was not read to its end.
        """
        self._checksum.check(self._server.url, self.headers.get(protocol.CHECKSUM), self._left)

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
    length = protocol.read_count(text)
    if length is not None:
        return length
    without_body = answer.status == 204 or answer.status >= 300
    answer.close()
    if text or not without_body:
        raise ProtocolError(f"the answer, status {answer.status}, has Content-Length {text!r}: a number is expected")
    return 0
