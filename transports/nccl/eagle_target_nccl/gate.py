"""The port at which clients come to a server: open only while one of them is expected, and only to what it names."""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field

from eagle_target.errors import ConnectError, TransferTimeout

logger = logging.getLogger(__name__)

NAME_BYTES = 16
BACKLOG = 64
# Connections that have not named whom they come for; the oldest goes when there is another.
MAX_STRANGERS = 64
STRANGER_SECONDS = 5.0
ACCEPTED_A_TURN = 16
PAUSE_SECONDS = 0.1


@dataclass(slots=True, eq=False)
class Visit:
    """A client that is expected. host, port: where. name: by which its connection is known."""

    host: str
    port: int
    name: bytes
    _arrived: queue.SimpleQueue[socket.socket | None] = field(default_factory=queue.SimpleQueue)

    def arrive(self, connection: socket.socket | None) -> None:
        """The client is here; None for one that is not waited for any more."""
        self._arrived.put(connection)

    def wait(self, deadline: float) -> socket.socket:
        """The client's connection.

        Raises:
            TransferTimeout: it did not come by then. ConnectError: it is not waited for any more.
        """
        try:
            connection = self._arrived.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty as error:
            raise TransferTimeout(f"no client came to {self.host}:{self.port} in time") from error
        if connection is None:
            raise ConnectError("the channel was closed before its client came")
        return connection

    def refuse(self) -> None:
        """Close the connection of a client that came when nobody waited any more, and wake who does wait."""
        with contextlib.suppress(queue.Empty):
            while True:
                late = self._arrived.get_nowait()
                if late is not None:
                    late.close()
        self.arrive(None)


@dataclass(slots=True)
class _Stranger:
    """What a connection has said so far of whom it comes for."""

    said: bytes = b""
    came_at: float = field(default_factory=time.monotonic)


class Gate:
    """Hands connections to those who expect them. It has sockets and a thread only while somebody is expected.

    Args:
        port: where it listens; 0 picks a free one.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._listeners: dict[str, socket.socket] = {}
        self._expected: dict[bytes, Visit] = {}
        self._strangers: dict[socket.socket, _Stranger] = {}
        self._watch: _Watch | None = None
        self._closed = False

    def expect(self, host: str) -> Visit:
        """Expect a client at an address of this machine.

        Raises:
            ConnectError: it is no address of this machine, the port is taken, or the server is closing.
        """
        with self._lock:
            if self._closed:
                raise ConnectError("this server is closing")
            if self._watch is None:
                self._watch = _Watch()
                thread = threading.Thread(
                    target=self._run, args=(self._watch,), name="eagle-target-nccl-gate", daemon=True
                )
                thread.start()
            try:
                if host not in self._listeners:
                    self._listeners[host] = self._listen(host, self._watch)
                visit = Visit(host, self._listeners[host].getsockname()[1], secrets.token_bytes(NAME_BYTES))
                self._expected[visit.name] = visit
            finally:
                self._tidy()
        return visit

    def forget(self, visit: Visit) -> None:
        """Expect a client no more; one that was not taken in yet is sent away."""
        with self._lock:
            self._expected.pop(visit.name, None)
            self._tidy()
        visit.refuse()

    def close(self) -> None:
        """Expect nobody any more. Safe to call twice."""
        with self._lock:
            self._closed = True
            for visit in self._expected.values():
                visit.arrive(None)
            self._expected.clear()
            self._tidy()

    def _listen(self, host: str, watch: _Watch) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, self._port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise ConnectError(
                f"this server cannot listen at {host!r} port {self._port}: {error}: name an address of its machine "
                "that clients reach with option host of transport 'nccl', and a free port"
            ) from error
        listener.setblocking(False)
        watch.add(listener)
        return listener

    def _tidy(self) -> None:
        """Close what nobody is expected at; the thread ends with the last of it."""
        watch, wanted = self._watch, {visit.host for visit in self._expected.values()}
        if watch is None:
            return
        for host in {*self._listeners} - wanted:
            watch.drop(self._listeners.pop(host))
        if not wanted:
            for connection in [*self._strangers]:
                self._send_away(connection, watch)
            self._watch = None
            watch.end()

    def _run(self, watch: _Watch) -> None:
        while True:
            ready = watch.wait(STRANGER_SECONDS)
            with self._lock:
                if self._watch is not watch:
                    watch.close()
                    return
                # Who has said something goes before who has just come, and may make room for it.
                heard = [self._hear(each, watch) for each in ready if each in self._strangers]
                for listener in [each for each in ready if each in self._listeners.values()]:
                    self._accept(listener, watch)
                self._send_late_away(watch)
                # Shut before they are let in, where they are the last.
                self._tidy()
                for arrived in heard:
                    if arrived is not None:
                        arrived[0].arrive(arrived[1])

    def _accept(self, listener: socket.socket, watch: _Watch) -> None:
        for _ in range(ACCEPTED_A_TURN):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                logger.warning("a client of transport 'nccl' was not let in: %s", error)
                time.sleep(PAUSE_SECONDS)
                return
            connection.setblocking(False)
            if len(self._strangers) >= MAX_STRANGERS:
                self._send_away(next(iter(self._strangers)), watch)
            self._strangers[connection] = _Stranger()
            watch.add(connection)

    def _hear(self, connection: socket.socket, watch: _Watch) -> tuple[Visit, socket.socket] | None:
        """Who is here with which connection, if that is known by now."""
        stranger = self._strangers[connection]
        try:
            said = connection.recv(NAME_BYTES - len(stranger.said))
        except BlockingIOError:
            return None
        except OSError:
            said = b""
        stranger.said += said
        if said and len(stranger.said) < NAME_BYTES:
            return None
        visit = self._expected.pop(stranger.said, None) if said else None
        if visit is None:
            self._send_away(connection, watch)
            return None
        del self._strangers[connection]
        watch.forget(connection)
        return visit, connection

    def _send_late_away(self, watch: _Watch) -> None:
        oldest = time.monotonic() - STRANGER_SECONDS
        for connection in [each for each, stranger in self._strangers.items() if stranger.came_at < oldest]:
            self._send_away(connection, watch)

    def _send_away(self, connection: socket.socket, watch: _Watch) -> None:
        del self._strangers[connection]
        watch.drop(connection)


class _Watch:
    """Sockets that a thread waits on, until it is told to end."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakes = socket.socketpair()
        self._selector.register(self._waker, selectors.EVENT_READ)

    def add(self, waited_for: socket.socket) -> None:
        """Wait on a socket, too; one that is waiting already notices."""
        self._selector.register(waited_for, selectors.EVENT_READ)

    def forget(self, waited_for: socket.socket) -> None:
        """Wait on it no more."""
        self._selector.unregister(waited_for)

    def drop(self, waited_for: socket.socket) -> None:
        """Wait on it no more, and close it."""
        self.forget(waited_for)
        waited_for.close()

    def wait(self, seconds: float) -> list[socket.socket]:
        """Sockets at which something has happened."""
        return [key.fileobj for key, _ in self._selector.select(seconds) if isinstance(key.fileobj, socket.socket)]

    def end(self) -> None:
        """Wake who waits."""
        self._wakes.close()

    def close(self) -> None:
        """Close what was for waking."""
        self._selector.close()
        self._waker.close()
