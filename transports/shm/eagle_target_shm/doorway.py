"""The Unix socket through which memory is handed to a client, and by which either end notices the other's death."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from eagle_target.errors import ConnectError
from eagle_target.seals import NONCE_BYTES, SEAL_BYTES, is_seal, new_key, new_nonce, seal

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

# In no file system, so that nothing is left of it.
ADDRESS = "\0eagle-target-shm-"
NAME_BYTES = 16
MESSAGE_BYTES = 8
GREETING = b"memory"
CONNECT_SECONDS = 5.0
MAX_STRANGERS = 64
# Those of other users are sent away as fast as they come.
BACKLOG = 1024
ACCEPTED_A_TURN = 64
SERVER, CLIENT = "server", "client"
PAUSE_SECONDS = 0.1


class Guest(Protocol):
    """What the server knows a client by. Called from the doorway's thread."""

    def enter(self, connection: socket.socket) -> None:
        """The client is here."""
        ...

    def hear(self, message: bytes) -> None:
        """The client said something."""
        ...

    def leave(self) -> None:
        """The client is gone, or was sent away; the connection is closed."""
        ...


@dataclass(frozen=True, slots=True)
class Invitation:
    """What one client is told over HTTP. name: by which it is known. key: by which the two ends know each other."""

    name: bytes
    key: bytes

    def seal(self, whose: str, doorway: str, server_nonce: bytes, client_nonce: bytes) -> bytes:
        """What shows at one doorway that its sender has the key."""
        return seal(self.key, whose, doorway, server_nonce, client_nonce)


@dataclass(frozen=True, slots=True)
class _Claim:
    """A stranger who says to be a guest. proof: what it would say if it is."""

    guest: Guest
    proof: bytes


class Doorway:
    """Waits for clients on a socket of a random name, and for what they say, on a thread of its own.

    name: by which a client of the same network namespace finds it.
    """

    def __init__(self) -> None:
        self.name = secrets.token_hex(NAME_BYTES)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(ADDRESS + self.name)
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._expected: dict[bytes, tuple[Invitation, Guest]] = {}
        self._strangers: dict[socket.socket, _Claim | None] = {}
        self._guests: dict[socket.socket, Guest] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="eagle-target-shm", daemon=True)
        self._thread.start()

    def expect(self, guest: Guest) -> Invitation:
        """Let a client in that shows to have what is returned."""
        invitation = Invitation(secrets.token_bytes(NAME_BYTES), new_key())
        with self._lock:
            self._expected[invitation.name] = invitation, guest
        return invitation

    def forget(self, invitation: Invitation) -> None:
        """Wait for a client no more; one that is here is left alone."""
        with self._lock:
            self._expected.pop(invitation.name, None)

    def close(self) -> None:
        """Send everybody away. Safe to call twice."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            os.close(self._wake)

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept_all()
                elif isinstance(key.fileobj, socket.socket):
                    try:
                        self._listen_to(key.fileobj)
                    except Exception:
                        # One client's failure is not the others'.
                        logger.exception("a client of transport 'shm' is sent away")
                        self._dismiss(key.fileobj)
        for connection in [*self._guests, *self._strangers]:
            self._dismiss(connection)
        self._selector.close()
        self._listener.close()

    def _accept_all(self) -> None:
        for _ in range(ACCEPTED_A_TURN):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                logger.warning("a client of transport 'shm' was not let in: %s", error)
                time.sleep(PAUSE_SECONDS)
                return
            if peer_user(connection) != os.geteuid():
                connection.close()
                continue
            connection.setblocking(False)
            self._strangers[connection] = None
            self._selector.register(connection, selectors.EVENT_READ)
            if len(self._strangers) > MAX_STRANGERS:
                self._dismiss(next(iter(self._strangers)))

    def _listen_to(self, connection: socket.socket) -> None:
        guest = self._guests.get(connection)
        try:
            message = connection.recv(NAME_BYTES + NONCE_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._dismiss(connection)
        elif guest is not None:
            guest.hear(message)
        else:
            self._hear_stranger(connection, message)

    def _hear_stranger(self, connection: socket.socket, message: bytes) -> None:
        claim = self._strangers[connection]
        if claim is not None and is_seal(message, claim.proof):
            del self._strangers[connection]
            self._guests[connection] = claim.guest
            claim.guest.enter(connection)
            return
        with self._lock:
            expected = self._expected.pop(message[:NAME_BYTES], None) if claim is None else None
        if expected is None or len(message) != NAME_BYTES + NONCE_BYTES:
            self._dismiss(connection)
            return
        invitation, guest = expected
        nonces = new_nonce(), message[NAME_BYTES:]
        self._strangers[connection] = _Claim(guest, invitation.seal(CLIENT, self.name, *nonces))
        connection.send(nonces[0] + invitation.seal(SERVER, self.name, *nonces))

    def _dismiss(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        self._strangers.pop(connection, None)
        guest = self._guests.pop(connection, None)
        if guest is not None:
            guest.leave()


def hand_over(connection: socket.socket, descriptors: Sequence[int]) -> None:
    """Give a client the descriptors of what it may map."""
    socket.send_fds(connection, [GREETING], descriptors)


def enter(name: str, invitation: Invitation) -> tuple[socket.socket, int]:
    """Go to a server's doorway; returns the connection and the descriptor that was handed over.

    Raises:
        ConnectError: nobody is there, or it is another user, or it does not expect this client, or has not invited it.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(CONNECT_SECONDS)
        connection.connect(ADDRESS + name)
        descriptor = _greet(connection, name, invitation)
        connection.setblocking(False)
    except OSError as error:
        connection.close()
        raise ConnectError(
            f"the server's Unix socket cannot be reached from here ({error}): it runs in another container or on "
            "another host"
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection, descriptor


def _greet(connection: socket.socket, name: str, invitation: Invitation) -> int:
    if peer_user(connection) != os.geteuid():
        raise ConnectError(f"the server's socket belongs to user {peer_user(connection)}, not to {os.geteuid()}")
    ours = new_nonce()
    connection.send(invitation.name + ours)
    answer = connection.recv(NONCE_BYTES + SEAL_BYTES)
    if not answer:
        raise ConnectError("the server's socket was closed: it expects another client")
    theirs = answer[:NONCE_BYTES]
    if not is_seal(answer[NONCE_BYTES:], invitation.seal(SERVER, name, theirs, ours)):
        raise ConnectError("who answers at the server's socket has not the key that was given over HTTP")
    connection.send(invitation.seal(CLIENT, name, theirs, ours))
    greeting, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    if greeting != GREETING or len(descriptors) != 1:
        for descriptor in descriptors:
            os.close(descriptor)
        raise ConnectError("the server's socket handed over no memory: it expects another client")
    return descriptors[0]


def peer_user(connection: socket.socket) -> int:
    """The user at the other end, as the kernel knows it."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def is_over(connection: socket.socket) -> bool:
    """Whether the other end is closed, for good. Reads nothing: after the greeting a server says no more."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def say(connection: socket.socket, number: int) -> None:
    """Tell the server a number, unless it is gone. Never waits: it is called by finalizers."""
    with contextlib.suppress(OSError):
        connection.send(number.to_bytes(MESSAGE_BYTES, "little"), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
