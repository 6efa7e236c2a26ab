"""Errors as `application/problem+json` (RFC 9457) with a stable type."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.responses import Response

from eagle_target.errors import ServerError
from eagle_target.protocol.problems import MEDIA_TYPE, ProblemType, problem_document, problem_type

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

# Where a request's scope has its `RequestRecord`.
RECORD = "eagle_target.record"


class Problem(Response):
    """A problem document."""

    def __init__(self, name: ProblemType, status: int, body: str, headers: dict[str, str]) -> None:
        super().__init__(body, status, headers, media_type=MEDIA_TYPE)
        self.name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, and say so to whoever observes the record."""
        if RECORD in scope:
            scope[RECORD].problem = self.name
        await super().__call__(scope, receive, send)


def problem(
    kind: ProblemType, detail: str, *, status: int | None = None, retry_after: float | None = None, close: bool = False
) -> Problem:
    """Make a problem response.

    Args:
        kind: the problem. detail: what was wrong and what to do. status: another than the problem's own.
        retry_after: seconds. close: whether the connection ends with it, because a body was left unread.
    """
    status = kind.status if status is None else status
    headers = {"Connection": "close"} if close else {}
    if retry_after is not None:
        headers["Retry-After"] = str(math.ceil(retry_after))
    body = problem_document(kind, detail, status=status, retry_after=retry_after)
    return Problem(kind, status, json.dumps(body), headers)


def problem_of(error: Exception) -> Problem:
    """The problem response for an error; anything unexpected is logged and told as `internal`, without details."""
    kind = problem_type(error)
    if isinstance(error, ServerError):
        close = error.status in (408, 411, 413)
        return problem(kind, str(error), status=error.status, retry_after=error.retry_after, close=close)
    if kind is not ProblemType.INTERNAL:
        return problem(kind, str(error))
    logger.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
    return problem(kind, "the server failed on this request; its log says why")


async def answer_problem(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's signature
    """Exception handler for every route."""
    return problem_of(error)


async def answer_nobody(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's signature
    """A client that is gone."""
    return Response(status_code=ProblemType.CLIENT_GONE.status)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Routes that do not exist, and methods they do not have."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    known = (ProblemType.NOT_FOUND, ProblemType.METHOD_NOT_ALLOWED)
    kind = next((each for each in known if each.status == status), ProblemType.HTTP)
    detail = f"{request.method} {request.url.path[:200]}: see docs/protocol.md for the routes"
    answer = problem(kind, detail, status=status)
    answer.headers.update(getattr(error, "headers", None) or {})
    return answer
