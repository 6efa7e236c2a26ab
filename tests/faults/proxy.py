"""A TCP proxy that lets some bytes through and then does what networks do."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

Fault = Literal["reset", "close", "hold"]


class Proxy:
    """Between clients and one server.

    `fail_next` arms a fault for the connections to come: after `after` bytes in one direction the connection is reset,
    closed, or held until `released` is set and then passed on.

    Attributes:
        url: where clients connect. failed: connections a fault has hit.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (str(parts.hostname), int(parts.port or 0))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._fault: tuple[Fault, str, int] | None = None
        self._left = 0
        self.failed = 0
        self.released = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="proxy")]
        self._threads[0].start()

    def fail_next(self, fault: Fault, *, after: int, times: int = 1, direction: str = "answer") -> None:
        self._fault, self._left = (fault, direction, after), times

    def close(self) -> None:
        self.released.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for end in self._sockets:
            _shut_down(end)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._server)
                except OSError:
                    client.close()
                    continue
                self._sockets += [client, server]
                thread = threading.Thread(target=self._connect, args=(client, server), name="proxy")
                self._threads.append(thread)
                thread.start()

    def _connect(self, client: socket.socket, server: socket.socket) -> None:
        """Pass bytes on both ways until either end is closed. One thread: a socket that is read cannot be reset."""
        passed = {"request": 0, "answer": 0}
        with client, server, contextlib.suppress(OSError):
            while True:
                readable, _, _ = select.select([client, server], [], [])
                source, sink = (client, server) if client in readable else (server, client)
                direction = "request" if source is client else "answer"
                data = source.recv(1 << 16)
                if not data:
                    return
                if self._fault is not None and self._left and self._fault[1] == direction:
                    keep = max(self._fault[2] - passed[direction], 0)
                    if keep < len(data):
                        sink.sendall(data[:keep])
                        if not self._strike(client, server):
                            return
                        data = data[keep:]
                sink.sendall(data)
                passed[direction] += len(data)

    def _strike(self, client: socket.socket, server: socket.socket) -> bool:
        """Whether the connection goes on."""
        assert self._fault is not None
        self._left -= 1
        self.failed += 1
        if self._fault[0] == "hold":
            self.released.wait(60)
            return True
        if self._fault[0] == "reset":
            for end in (client, server):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False


def _shut_down(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxied(url: str) -> Iterator[Proxy]:
    proxy = Proxy(url)
    try:
        yield proxy
    finally:
        proxy.close()
