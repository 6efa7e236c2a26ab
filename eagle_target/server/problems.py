"""Errors as `application/problem+json` (RFC 9457) with a stable type."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.responses import Response

from eagle_target.errors import (
    AdapterError,
    ConnectError,
    ContractError,
    EagleTargetError,
    ProtocolError,
    ServerError,
    TransportError,
    VocabMappingError,
)
from eagle_target.protocol.messages import PROBLEM_TYPE, PROBLEM_URN

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

# nginx's status for a client that went away; nobody reads it, the metrics count it.
CLIENT_GONE = 499

# Where a request's scope has its `Exchange`.
EXCHANGE = "eagle_target.exchange"

# The first class an error is an instance of decides; status and last part of the type.
PROBLEMS: tuple[tuple[type[EagleTargetError], int, str], ...] = (
    (VocabMappingError, 422, "invalid-vocab-mapping"),
    (ContractError, 422, "contract"),
    (ProtocolError, 400, "malformed-body"),
    (ConnectError, 409, "transport-refused"),
    (TransportError, 500, "transport-failed"),
    (AdapterError, 500, "engine-failed"),
)


class Problem(Response):
    """A problem document. name: last part of its type."""

    def __init__(self, name: str, status: int, body: str, headers: dict[str, str]) -> None:
        super().__init__(body, status, headers, media_type=PROBLEM_TYPE)
        self.name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, and say so to whoever observes the exchange."""
        if EXCHANGE in scope:
            scope[EXCHANGE].problem = self.name
        await super().__call__(scope, receive, send)


def problem(status: int, name: str, detail: str, *, retry_after: float | None = None, close: bool = False) -> Problem:
    """Make a problem response.

    Args:
        status: HTTP status. name: last part of the problem's type. detail: what was wrong and what to do.
        retry_after: seconds. close: whether the connection ends with it, because a body was left unread.
    """
    body = {"type": PROBLEM_URN + name, "title": name.replace("-", " "), "status": status, "detail": detail}
    headers = {"Connection": "close"} if close else {}
    if retry_after is not None:
        body["retry_after"] = retry_after
        headers["Retry-After"] = str(math.ceil(retry_after))
    return Problem(name, status, json.dumps(body), headers)


def problem_of(error: Exception) -> Problem:
    """The problem response for an error; anything unexpected is logged and told as `internal`, without details."""
    if isinstance(error, ServerError):
        close = error.status in (408, 411, 413)
        return problem(error.status, error.problem, str(error), retry_after=error.retry_after, close=close)
    for kind, status, name in PROBLEMS:
        if isinstance(error, kind):
            return problem(status, name, str(error))
    logger.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
    return problem(500, "internal", "the server failed on this request; its log says why")


async def answer_problem(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's signature
    """Exception handler for every route."""
    return problem_of(error)


async def answer_nobody(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's signature
    """A client that is gone."""
    return Response(status_code=CLIENT_GONE)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Routes that do not exist, and methods they do not have."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    name = {404: "not-found", 405: "method-not-allowed"}.get(status, "http")
    answer = problem(status, name, f"{request.method} {request.url.path[:200]}: see docs/protocol.md for the routes")
    answer.headers.update(getattr(error, "headers", None) or {})
    return answer
