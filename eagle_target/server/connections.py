"""HTTP connections that do not stay open for nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio


class TimedConnection(HttpToolsProtocol):
    """uvicorn's connection, closed when a request's headers do not come within `headers_timeout` seconds.

    uvicorn 0.54 times idle connections between requests, but neither silent ones nor headers that never end.
    """

    headers_timeout: ClassVar[float] = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._request_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request."""
        super().connection_made(transport)
        self._expect_headers()

    def on_message_begin(self) -> None:
        """Wait for the rest of the headers."""
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        """Go on without a timer: the body has its own."""
        self._stop_timer()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if self._request_timer is None:
            self._request_timer = self.loop.call_later(self.headers_timeout, self.timeout_keep_alive_handler)

    def _stop_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None


def timed_connections(headers_timeout: float) -> type[TimedConnection]:
    """The class with a timeout of its own: uvicorn takes a class, and no arguments for it."""
    return type("TimedConnection", (TimedConnection,), {"headers_timeout": headers_timeout})
