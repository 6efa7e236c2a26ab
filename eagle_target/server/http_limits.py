"""What a stranger's connection and request may take: time, memory, places."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from eagle_target.protocol.problems import ProblemType
from eagle_target.server.bodies import read_body
from eagle_target.server.problems import problem

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from starlette.requests import Request

    from eagle_target.config import ServerConfig
    from eagle_target.contract.request import SupervisionRequest

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
# Longer than a route waits for a body, so that it is the one to say so.
GRACE_SECONDS = 5.0
LIMITS = ("max_connections", "max_headers", "max_header_bytes", "headers_timeout", "body_timeout")


class LimitedConnection(HttpToolsProtocol):
    """uvicorn's connection, with an answer and an end for what is past a limit.

    uvicorn 0.54 times idle connections between requests, but neither silent ones nor headers that never end, and takes
    any number of headers of any size.
    """

    max_connections: ClassVar[int]
    max_headers: ClassVar[int]
    max_header_bytes: ClassVar[int]
    headers_timeout: ClassVar[float]
    body_timeout: ClassVar[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._is_in_head = True
        self._raw_bytes = self._parsed_bytes = 0
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request, if there is room for it."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(
                ProblemType.TOO_MANY_CONNECTIONS,
                f"this server holds {self.max_connections} connections: try later, or raise max_connections",
                retry_after=RETRY_SECONDS,
            )
            return
        self._start_timer(self.headers_timeout)

    def data_received(self, data: bytes) -> None:
        """Count what stands before a body, also what the parser holds of a header that has no end yet."""
        if self._is_refused:
            return
        super().data_received(data)
        if self._is_in_head:
            self._raw_bytes += len(data)
            self._check_head()

    def on_message_begin(self) -> None:
        """Wait for the rest of the headers."""
        super().on_message_begin()
        self._is_in_head, self._raw_bytes, self._parsed_bytes = True, 0, 0
        self._start_timer(self.headers_timeout)

    def on_url(self, url: bytes) -> None:
        """Count the first line."""
        self._parsed_bytes += len(url)
        if self._check_head():
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header; those behind a chunked body count, too."""
        self._parsed_bytes += len(name) + len(value) + 4
        if self._check_head():
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Wait for the body, which whoever reads it has less patience with; the others never read it."""
        if self._is_refused:
            return
        self._stop_timer()
        self._start_timer(self.body_timeout + GRACE_SECONDS)
        self._is_in_head, self._raw_bytes = False, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take the body of a request that was let in."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request that was let in."""
        if not self._is_refused:
            self._stop_timer()
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    @staticmethod
    def on_refused(kind: ProblemType) -> None:
        """Told of each connection that is refused."""

    def _check_head(self) -> bool:
        if self._is_refused:
            return False
        size = max(self._raw_bytes, self._parsed_bytes)
        if size <= self.max_header_bytes and len(self.headers or ()) < self.max_headers:
            return True
        self._refuse(
            ProblemType.HEADERS_TOO_LARGE,
            f"this server takes {self.max_headers} headers of {self.max_header_bytes} bytes together, with the first "
            "line: send less, or raise max_headers and max_header_bytes",
        )
        return False

    def _refuse(self, kind: ProblemType, detail: str, *, retry_after: float | None = None) -> None:
        """Answer without the application, and end the connection."""
        self._is_refused = True
        self._stop_timer()
        if self.transport.is_closing():
            return
        answer = problem(kind, detail, retry_after=retry_after, close=True)
        lines = [f"HTTP/1.1 {kind.status} {kind}".encode(), *(key + b": " + value for key, value in answer.raw_headers)]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
        self.transport.close()
        self.on_refused(kind)
        logger.warning("a connection was refused: %s", kind)

    def _start_timer(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def limited_connections(config: ServerConfig, on_refused: Callable[[ProblemType], None]) -> type[LimitedConnection]:
    """The class with a server's limits: uvicorn takes a class, and no arguments for it.

    Args:
        on_refused: called with the problem of each connection that is refused.
    """
    limits = {name: getattr(config, name) for name in LIMITS}
    return type("LimitedConnection", (LimitedConnection,), {**limits, "on_refused": staticmethod(on_refused)})


def check_size(request: SupervisionRequest, config: ServerConfig) -> None:
    """Hold a request to the server's limits.

    Raises:
        RequestTooLarge: too many tokens, too many sequences, or one that is too long.
    """
    # Lengths that do not add up to the tokens are told as such, later.
    longest = min(max(request.seq_lens, default=0), request.tokens)
    limits = (
        (ProblemType.TOO_MANY_TOKENS, "tokens", request.tokens, "max_request_tokens"),
        (ProblemType.TOO_MANY_SEQUENCES, "sequences", len(request.seq_lens), "max_sequences"),
        (ProblemType.SEQUENCE_TOO_LONG, "tokens in a sequence", longest, "max_sequence_tokens"),
    )
    for kind, what, count, setting in limits:
        most = getattr(config, setting)
        if count > most:
            raise kind.error(
                f"the request has {count} {what}, this server takes {most}: send fewer, or raise {setting}"
            )


async def read_mapping_body(request: Request, config: ServerConfig) -> memoryview:
    """Read a vocabulary mapping's body.

    Raises:
        RequestTooLarge: more than `max_mapping_bytes` were announced. ServerError: see `read_body`.
    """
    return await read_body(
        request,
        limit=config.max_mapping_bytes,
        timeout=config.body_timeout,
        problem=ProblemType.MAPPING_TOO_LARGE,
        setting="max_mapping_bytes",
    )
