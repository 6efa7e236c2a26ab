"""A TCP server that answers HTTP requests with whatever bytes a test wants, right or wrong."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from eagle_target.protocol import messages
from tests.server.http import Answer, ask

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator, Mapping


@dataclass(frozen=True)
class Received:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Stub:
    """Hands each request to `respond`, which writes to the socket; a true answer keeps the connection.

    Attributes:
        url: where it listens. accepted: connections so far. received: requests so far.
    """

    def __init__(self, respond: Callable[[Received, socket.socket], bool | None]) -> None:
        self._respond = respond
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.accepted = 0
        self.received: list[Received] = []
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="stub")]
        self._threads[0].start()

    @property
    def open_connections(self) -> int:
        return sum(connection.fileno() != -1 for connection in self._connections)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.accepted += 1
                self._connections.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,), name="stub")
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError), connection.makefile("rb") as reader:
            while request := _read_request(reader):
                self.received.append(request)
                if not self._respond(request, connection):
                    return


@contextlib.contextmanager
def stub(respond: Callable[[Received, socket.socket], bool | None]) -> Iterator[Stub]:
    running = Stub(respond)
    try:
        yield running
    finally:
        running.close()


@contextlib.contextmanager
def replying(*replies: bytes, keep: bool = False) -> Iterator[Stub]:
    """Answer the first request with the first bytes and so on, the last ones again and again."""
    left = list(replies)

    def respond(_: Received, connection: socket.socket) -> bool:
        connection.sendall(left.pop(0) if len(left) > 1 else left[0])
        return keep

    with stub(respond) as running:
        yield running


@contextlib.contextmanager
def forwarding(
    url: str,
    change: Callable[[Received, Answer], Answer] = lambda _, answer: answer,
    change_request: Callable[[Received], Received] = lambda request: request,
) -> Iterator[Stub]:
    """Pass requests on to a real server, and its answers back, either changed."""

    def respond(request: Received, connection: socket.socket) -> bool:
        request = change_request(request)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        answer = change(request, ask(url, request.method, request.path, request.body or None, headers))
        connection.sendall(encode(answer))
        return True

    with stub(respond) as running:
        yield running


def with_body(answer: Answer, body: bytes) -> Answer:
    """The same answer with another body, as if that had been sent."""
    headers = {name: value for name, value in answer.headers.items() if name.lower() != messages.CHECKSUM.lower()}
    return replace(answer, body=body, headers={**headers, "content-length": str(len(body))})


def encode(answer: Answer) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} X", *(f"{name}: {value}" for name, value in answer.headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + answer.body


def reply(body: bytes = b"", status: int = 200, **headers: str) -> bytes:
    """A well-formed answer, but for what `headers` say otherwise."""
    given = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    return encode(Answer(status, {name: value for name, value in given.items() if value != "-"}, body))


def _read_request(reader: io.BufferedIOBase) -> Received | None:
    line = reader.readline().decode("latin-1").split()
    if len(line) != 3:
        return None
    message = http.client.parse_headers(reader)
    body = reader.read(int(message.get("Content-Length", "0")))
    return Received(line[0], line[1], dict(message.items()), body)
