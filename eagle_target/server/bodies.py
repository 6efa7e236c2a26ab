"""Bodies in and out: sizes are checked before memory is taken, and nobody is waited for without end."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import numpy
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from eagle_target.errors import ProtocolError
from eagle_target.protocol import messages
from eagle_target.protocol.problems import ProblemType

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from starlette.types import Receive, Scope, Send

    from eagle_target.plugins.transport import Reply
    from eagle_target.server.engine.answer import Answer

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20


async def read_body(
    request: Request,
    *,
    limit: int,
    timeout: float,
    problem: ProblemType = ProblemType.BODY_TOO_LARGE,
    setting: str = "max_body_bytes",
) -> memoryview:
    """Read a request's body into memory taken once.

    Args:
        limit: bytes it may have. timeout: seconds it may take.
        problem, setting: what a body past the limit is called, and what raises the limit.

    Raises:
        ServerError: no Content-Length, or the body took longer than `timeout` seconds.
        RequestTooLarge: more than `limit` bytes were announced.
        ProtocolError: a checksum came with the body, and is another's.
    """
    length = messages.read_count(request.headers.get("content-length", ""))
    if length is None:
        raise ProblemType.LENGTH_REQUIRED.error("the request needs a Content-Length header")
    if length > limit:
        raise problem.error(f"the body has {length} bytes, this server takes {limit}: send less, or raise {setting}")
    # Not zeroed: a client that announces much and sends nothing takes no memory.
    body = numpy.empty(length, numpy.uint8).data
    filled = 0
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                body[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
    except TimeoutError as error:
        raise ProblemType.BODY_TIMEOUT.error(
            f"{filled} of {length} bytes of the body came within {timeout:g} seconds"
        ) from error
    if filled != length:
        raise ClientDisconnect
    announced = request.headers.get(messages.CHECKSUM)
    if announced is not None and announced != (found := messages.checksum_of([body])):
        raise ProtocolError(
            f"the request announced checksum {announced[:64]!r}, its body has {found!r}: it changed on its way"
        )
    return body


async def checksum_headers(request: Request, reply: Reply) -> dict[str, str]:
    """The header with a body's checksum, for a client that asked for it."""
    if request.headers.get(messages.WANT_CHECKSUM) != messages.CHECKSUM_NAME:
        return {}
    return {messages.CHECKSUM: await run_in_threadpool(messages.checksum_of, reply.parts)}


class CheckedJson(JSONResponse):
    """JSON with its checksum."""

    def __init__(self, content: Mapping[str, Any], status_code: int = 200) -> None:
        super().__init__(content, status_code)
        self.headers[messages.CHECKSUM] = messages.checksum_of([self.body])


class TensorResponse(Response):
    """Streams a transport's reply from the tensors' own memory.

    A client that stops reading for `send_timeout` seconds is dropped. `answer` is released when it is sent or given up;
    `on_sent` is called once everything is sent.
    """

    def __init__(
        self,
        reply: Reply,
        headers: Mapping[str, str],
        *,
        send_timeout: float,
        answer: Answer | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        self._reply = reply
        self._answer = answer
        self._on_sent = on_sent
        self._send_timeout = send_timeout
        super().__init__(
            headers={**headers, "Content-Length": str(reply.length)},
            media_type=reply.content_type,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI
        """Send the start, then every part in chunks."""
        try:
            await self._send(send)
        finally:
            if self._answer is not None:
                self._answer.release()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            for part in self._reply.parts:
                for start in range(0, len(part), CHUNK_BYTES):
                    async with asyncio.timeout(self._send_timeout):
                        chunk = part[start : start + CHUNK_BYTES]
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TimeoutError:
            # The response stays incomplete, on which the HTTP server closes the connection.
            logger.warning("dropped a client that read nothing for %g seconds", self._send_timeout)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if self._on_sent is not None:
            self._on_sent()


async def wait_for_disconnect(request: Request) -> None:
    """Return once the client is gone. Only after the body was read."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


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


async def wait_for_answer(future: Future[Answer], request: Request) -> Answer:
    """Wait for a queued request, and give it up when its client is gone. The caller releases the answer.

    Raises:
        ClientDisconnect: it is gone. EagleTargetError: what the request ran into.
    """
    answer = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(wait_for_disconnect(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
    finally:
        gone.cancel()
        if not answer.done():
            # The engine may be handing it over at this moment, and nothing else is told of what comes then.
            future.add_done_callback(_release_unwanted)
            answer.cancel()
    raise ClientDisconnect


def _release_unwanted(future: Future[Answer]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
