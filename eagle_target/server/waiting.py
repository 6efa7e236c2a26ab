"""Between a supervision request and its answer: waiting for the engine, and until everything is sent."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from eagle_target.server.bodies import wait_for_disconnect

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from eagle_target.server.jobs import Supervised


class FollowedResponse(Response):
    """A response that says when it is sent, or given up: a drain waits for it."""

    def __init__(self, response: Response, on_end: Callable[[], None]) -> None:
        self._response = response
        self._on_end = on_end
        self.status_code = response.status_code
        self.background = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await self._response(scope, receive, send)
        finally:
            self._on_end()


async def wait_for_answer(future: Future[Supervised], request: Request) -> Supervised:
    """Wait for a queued request, and give it up when its client is gone.

    Raises:
        ClientDisconnect: it is gone. EagleTargetError: what the request ran into.
    """
    answer = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(wait_for_disconnect(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        gone.cancel()
        answer.cancel()
