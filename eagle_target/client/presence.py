"""Tells one server that its client is there, however long it asks for nothing, and when it leaves."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING
from urllib.parse import quote

from eagle_target import protocol
from eagle_target.errors import EagleTargetError, ProtocolError, ServerError

if TYPE_CHECKING:
    from eagle_target.client.connection import ServerConnection

logger = logging.getLogger(__name__)

# Until a server has told its lease, and how many renewals of it may be lost in a row.
FIRST_PAUSE_SECONDS = 5.0
RENEWALS_A_LEASE = 3
RENEWAL_SECONDS = 10.0
# A client that ends does not wait long for a server to hear of it.
LEAVE_SECONDS = 2.0
NO_SUCH_ROUTE = "not-found"


class Presence:
    """Renews a client's presence on a thread of its own.

    Args:
        connection: HTTP to the server. client_id: as all its requests have it.
    """

    def __init__(self, connection: ServerConnection, client_id: str) -> None:
        self._connection = connection
        self._path = f"{protocol.CLIENTS}/{quote(client_id, safe='')}"
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """The server has answered: have it know from now on that this client is there. Safe to call again."""
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None and not self._ended.is_set():
                self._thread = threading.Thread(target=self._keep, name="eagle-target-presence", daemon=True)
                self._thread.start()

    def end(self) -> None:
        """Say that this client leaves, if the server can be told. Safe to call twice."""
        with self._lock:
            self._ended.set()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(LEAVE_SECONDS)

    def _keep(self) -> None:
        pause: float | None = FIRST_PAUSE_SECONDS
        is_there = True
        while pause is not None and not self._ended.wait(pause):
            try:
                pause = self._renew()
                is_there = True
            except EagleTargetError as error:
                is_there = False
                logger.debug("%s was not told that this client is there: %s", self._connection.url, error)
        if pause is not None and is_there:
            self._leave()

    def _renew(self) -> float | None:
        """Seconds until it has to be done again; None where the server knows of no such thing."""
        try:
            answer = self._connection.request_json("PUT", self._path, timeout=RENEWAL_SECONDS)
        except ServerError as error:
            if error.problem == NO_SUCH_ROUTE:
                return None
            raise
        lease = protocol.read_json_object(answer, "the answer to a presence").get("lease_seconds")
        if not isinstance(lease, int | float) or lease <= 0:
            raise ProtocolError(f"{self._connection.url} keeps clients for {lease!r} seconds")
        return float(lease) / RENEWALS_A_LEASE

    def _leave(self) -> None:
        try:
            self._connection.request("DELETE", self._path, timeout=LEAVE_SECONDS)
        except EagleTargetError as error:
            logger.debug("%s was not told that this client leaves: %s", self._connection.url, error)
