"""Where the two ends of a group meet: a store on a port of the server, a prefix nobody can guess for each group."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed

from eagle_target.errors import ConnectError

PREFIX_BYTES = 16


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where one group meets; never used twice, so that a new group is a new epoch."""

    host: str
    port: int
    prefix: str

    def join(self, timeout: float) -> Any:
        """Connect to the store.

        Raises:
            RuntimeError: it cannot be reached within `timeout` seconds.
        """
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            self.host, self.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )
        return distributed.PrefixStore(self.prefix, store)  # type: ignore[attr-defined]

    def local_address(self, timeout: float) -> str:
        """The address of this machine from which the store is reached.

        Raises:
            ConnectError: it is not reached.
        """
        try:
            with socket.create_connection((self.host, self.port), timeout=timeout) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            raise ConnectError(
                f"cannot connect to {self.host}:{self.port}, where groups with this server meet: {error}: open the "
                "port (option port sets it), or name another address of the server with its option host"
            ) from error


class MeetingPlace:
    """A server's stores: one for each of its addresses that clients reach, listening there and nowhere else.

    Args:
        port: where they listen; 0 picks a free one. timeout: seconds a store may take to answer.
    """

    def __init__(self, port: int, timeout: float) -> None:
        self._port = port
        self._timeout = timedelta(seconds=timeout)
        self._lock = threading.Lock()
        self._stores: dict[str, Any] = {}
        self._closed = False

    def listen(self, host: str) -> None:
        """Listen at an address of this machine, unless that is done already.

        Raises:
            ConnectError: it is no address of this machine, or the port is taken.
        """
        with self._lock:
            if self._closed:
                raise ConnectError("this server is closing")
            if host not in self._stores:
                self._stores[host] = self._listen(host)

    def arrange(self, host: str) -> Meeting:
        """A new meeting at an address that is listened at.

        Raises:
            ConnectError: this server is closing.
        """
        with self._lock:
            if host not in self._stores:
                raise ConnectError("this server is closing")
            return Meeting(host, self._stores[host].port, secrets.token_hex(PREFIX_BYTES))

    def forget(self, meeting: Meeting) -> None:
        """Drop what a group left in its store; a torch whose stores cannot list their keys keeps those few bytes."""
        with self._lock, contextlib.suppress(RuntimeError):
            store = self._stores.get(meeting.host)
            if store is not None and hasattr(store, "list_keys"):
                for key in store.list_keys():
                    if key.startswith(meeting.prefix):
                        store.delete_key(key)

    def close(self) -> None:
        """Close the stores; who waits in one gets an error. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._stores.clear()

    def _listen(self, host: str) -> Any:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, self._port), family=family)
        except OSError as error:
            raise ConnectError(
                f"this server cannot listen at {host!r} port {self._port}: {error}: name an address of its machine "
                "that clients reach with option host of transport 'nccl', and a free port"
            ) from error
        port = listener.getsockname()[1]
        return distributed.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=self._timeout,
            master_listen_fd=listener.detach(),
        )


def numeric_address(host: str) -> str:
    """The first address of a host.

    Raises:
        ConnectError: it has none.
    """
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConnectError(f"{host!r} has no address: {error}") from error


def checked_address(text: Any) -> str:
    """An address that a peer named.

    Raises:
        ConnectError: it is not one of a single host.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise ConnectError(f"{str(text)[:64]!r} is not an address") from error
    if address.is_unspecified or address.is_multicast:
        raise ConnectError(f"{address} is not the address of a host")
    return str(address)
