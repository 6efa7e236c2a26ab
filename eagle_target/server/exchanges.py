"""One HTTP request and its answer, as the log, the metrics and the status page see it."""

from __future__ import annotations

import logging
import secrets
import time
from typing import TYPE_CHECKING, Any

from eagle_target import protocol
from eagle_target.server.logs import FIELDS
from eagle_target.server.problems import EXCHANGE
from eagle_target.server.subjects import Subject, printable, set_subject

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

# Asked every few seconds by supervisors and scrapers, and by browsers that show the status page.
ROUTINE_PATHS = (protocol.HEALTH, protocol.READY, protocol.METRICS, protocol.STATUS)
# Longer parts of a path are hashes and channels' ids, or a stranger's.
MAX_PART_LETTERS = 16


class Exchange:
    """A request from its headers on.

    Attributes:
        request_id: what the client calls it, or a new one. problem: last part of the answered problem's type.
        fields: what else the log should say of it.
    """

    def __init__(self, scope: Scope) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        address = scope["client"][0] if scope.get("client") else ""
        self.request_id = headers.get(protocol.REQUEST_ID.lower().encode()) or secrets.token_hex(8)
        self.client_id = headers.get(protocol.CLIENT.lower().encode()) or address
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.status = 0
        self.is_sent = False
        self.problem = ""
        self.fields: dict[str, Any] = {}
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since its headers came."""
        return time.perf_counter() - self._started

    @property
    def subject(self) -> Subject:
        """Whom lines of the log about it are about."""
        return Subject(printable(self.request_id), printable(self.client_id))

    def note(self, message: Message) -> None:
        """See a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.is_sent = not message.get("more_body", False)


class ObservedApp:
    """An ASGI application whose every request is logged, and told about when it is over.

    Args:
        app: what answers. on_end: called with each exchange.
    """

    def __init__(self, app: ASGIApp, on_end: Callable[[Exchange], None]) -> None:
        self._app = app
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; lines of the log that are written meanwhile bear its ids."""
        exchange = scope[EXCHANGE] = Exchange(scope)
        # uvicorn runs each request in a context of its own, and logs how it ended there.
        set_subject(exchange.subject)

        async def send_noted(message: Message) -> None:
            exchange.note(message)
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception:
            # Starlette raises again what it has answered and `problem_of` has logged.
            if not exchange.is_sent:
                raise
        finally:
            _log(exchange)
            self._on_end(exchange)


def shown_path(path: str) -> str:
    """A path without hashes, ids of channels and whatever else a stranger may have put there."""
    parts = (printable(part) if len(part) <= MAX_PART_LETTERS else "*" for part in path.split("/")[:8])
    return "/".join(parts)


def _log(exchange: Exchange) -> None:
    level = logging.DEBUG if exchange.status < 400 or exchange.path in ROUTINE_PATHS else logging.INFO
    if exchange.status == 401 or (exchange.status >= 500 and exchange.status != 503):
        level = logging.WARNING
    if not logger.isEnabledFor(level):
        return
    fields: dict[str, Any] = {
        "method": printable(exchange.method),
        "path": shown_path(exchange.path),
        "status": exchange.status,
        "seconds": round(exchange.seconds, 6),
        **({"problem": exchange.problem} if exchange.problem else {}),
        **exchange.fields,
    }
    shown = " ".join(f"{name}={value}" for name, value in fields.items())
    logger.log(level, "answered %s", shown, extra={FIELDS: fields})
