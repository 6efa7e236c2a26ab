"""What one request has open, so that whoever no longer wants its answer can end it from another thread."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from eagle_target.errors import ConnectError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.client.balancer import Standing


class _Present(threading.local):
    errand: Errand | None = None


_present = _Present()


class Errand:
    """A request under way on one thread.

    Attributes:
        standing: the server it is at. nbytes: received in bodies so far. given_up: nobody wants its answer any more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.standing: Standing | None = None
        self.nbytes = 0
        self.given_up = False

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Requests that this thread makes in the block belong to this errand."""
        before, _present.errand = _present.errand, self
        try:
            yield
        finally:
            _present.errand = before

    def go_to(self, standing: Standing) -> None:
        """Turn to a server.

        Raises:
            ConnectError: the errand was given up.
        """
        self.standing = standing
        if self.given_up:
            raise ConnectError(f"the request to {standing.peer.url} was given up: another server answered it")

    def hold(self, connected: socket.socket) -> None:
        """Use a socket, until `let_go`; it is cut when the errand is given up, or was."""
        with self._lock:
            self._socket = connected
            if self.given_up:
                shut_down(connected)

    def let_go(self) -> None:
        """The socket serves others from now on."""
        with self._lock:
            self._socket = None

    def give_up(self) -> None:
        """Have whatever waits on the errand's socket fail now, and the server notice that nobody waits."""
        with self._lock:
            self.given_up = True
            if self._socket is not None:
                shut_down(self._socket)


def present_errand() -> Errand:
    """This thread's errand; one that nobody knows where there is none."""
    return _present.errand or Errand()


def shut_down(connected: socket.socket) -> None:
    """End a connection in both directions, from any thread; whoever waits on it gets an error."""
    # Not TLS's own shutdown, which takes the session from under whoever reads.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
