"""A TCP proxy that lets some bytes through and then does what networks do."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Fault = Literal["reset", "close", "hold", "pass", "flip"]


@dataclass
class Armed:
    """A fault for the next `left` connections that have passed `after` bytes in one direction since it was armed.

    They are reset, closed, held until the proxy is released and then passed on, or passed on at once; with `flip` one
    byte is changed. first: is done before, while not a byte more gets through.
    """

    fault: Fault
    after: int
    left: int = 1
    direction: str = "answer"
    first: Callable[[], object] = bool
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> bool:
        """Whether it is for who asks."""
        with self._lock:
            self.left -= 1
            return self.left >= 0


class Proxy:
    """Between clients and one server.

    Attributes:
        url, address: where clients connect. failed: connections a fault has hit. armed: the fault, or none.
        released: when it is set, what is held goes on.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (str(parts.hostname), int(parts.port or 0))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = ("127.0.0.1", int(self._listener.getsockname()[1]))
        self.url = "http://{}:{}".format(*self.address)
        self.armed: Armed | None = None
        self.failed = 0
        self.released = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="proxy")]
        self._threads[0].start()

    def fail_next(self, fault: Fault, *, after: int, times: int = 1, direction: str = "answer") -> None:
        self.armed = Armed(fault, after, times, direction)

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
        armed, passed = self.armed, 0
        with client, server, contextlib.suppress(OSError):
            while True:
                readable, _, _ = select.select([client, server], [], [])
                source, sink = (client, server) if client in readable else (server, client)
                data = source.recv(1 << 16)
                if not data:
                    return
                if armed is not self.armed:
                    armed, passed = self.armed, 0
                if (
                    armed is not None
                    and armed.left > 0
                    and armed.direction == ("request" if source is client else "answer")
                ):
                    keep = max(armed.after - passed, 0)
                    if keep < len(data) and armed.take():
                        sink.sendall(data[:keep])
                        if not self._strike(armed, client, server):
                            return
                        data = data[keep:]
                        if armed.fault == "flip":
                            data = bytes([data[0] ^ 1]) + data[1:]
                    passed += len(data)
                sink.sendall(data)

    def _strike(self, armed: Armed, client: socket.socket, server: socket.socket) -> bool:
        """Whether the connection goes on."""
        self.failed += 1
        armed.first()
        if armed.fault == "hold":
            self.released.wait(60)
        elif armed.fault == "reset":
            for end in (client, server):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return armed.fault not in ("reset", "close")


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
