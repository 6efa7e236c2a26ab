"""What a client tells a server while it has nothing to ask: that it is there, and that its channels are used."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from eagle_target.errors import EagleTargetError, ProtocolError, ServerError
from eagle_target.protocol import messages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.client.http import ServerConnection

logger = logging.getLogger(__name__)

# A client that ends does not wait long for a server to hear of it.
GIVE_UP_SECONDS = 2.0
# Renewals that may be lost in a row before the server takes the client for dead.
RENEWALS_A_LEASE = 3


class ChannelControl:
    """A `ControlPlane` over HTTP. A thread of its own renews the lease while the channel is open.

    Args:
        connection: HTTP to the server. transport: whose channel it is.
        device: where batches go. target_device: where the target runs.
    """

    def __init__(self, connection: ServerConnection, transport: str, *, device: str, target_device: str) -> None:
        self._connection = connection
        self.transport = transport
        parts = urlsplit(connection.url)
        self.address = parts.hostname or ""
        self.is_private = parts.scheme == "https"
        self.device = device
        self.target_device = target_device
        self.channel_id: str | None = None
        self.lost = False
        self._ended = threading.Event()

    def open_channel(self, hello: Mapping[str, Any]) -> Mapping[str, Any]:
        """Have the server accept the channel, and renew its lease from now on.

        Raises:
            ProtocolError: the answer names no channel or no lease.
        """
        answer = self._connection.request_json("POST", f"{messages.TRANSPORTS}/{self.transport}/channels", hello)
        reply = messages.read_json_object(answer, "the answer to opening a channel")
        channel_id, lease = reply.pop("channel", None), reply.pop("lease_seconds", None)
        if not isinstance(channel_id, str) or not isinstance(lease, int | float) or lease <= 0:
            raise ProtocolError(
                f"{self._connection.url} opened channel {channel_id!r} with a lease of {lease!r} seconds"
            )
        self.channel_id = channel_id
        # Not joined: it ends by itself, and may be waiting for a server that is gone.
        threading.Thread(
            target=self._keep, args=(lease / RENEWALS_A_LEASE,), name="eagle-target-lease", daemon=True
        ).start()
        return reply

    def tell(self, message: Mapping[str, Any], *, timeout: float | None = None) -> Mapping[str, Any]:
        """Have the channel's `answer` called; returns what it answered."""
        answer = self._connection.request_json("POST", f"{self._path}/messages", message, timeout=timeout)
        return messages.read_json_object(answer, "the answer to a channel's message")

    def give_up(self) -> None:
        """Tell the server that the channel is not used any more, if it can be told. Safe to call twice."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self.channel_id is None or self.lost:
            return
        try:
            self._connection.request("DELETE", self._path, timeout=GIVE_UP_SECONDS)
        except EagleTargetError as error:
            logger.debug("channel %s of %s was not closed: %s", self.channel_id, self._connection.url, error)

    @property
    def _path(self) -> str:
        return f"{messages.TRANSPORTS}/{self.transport}/channels/{self.channel_id}"

    def _keep(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            try:
                self._connection.request("PUT", self._path, timeout=seconds)
            except ServerError as error:
                if error.problem == "unknown-channel":
                    self.lost = True
                    return
                logger.debug("the lease of channel %s was not renewed: %s", self.channel_id, error)
            except EagleTargetError as error:
                logger.debug("the lease of channel %s was not renewed: %s", self.channel_id, error)


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
        self._path = f"{messages.CLIENTS}/{quote(client_id, safe='')}"
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
        lease = messages.read_json_object(answer, "the answer to a presence").get("lease_seconds")
        if not isinstance(lease, int | float) or lease <= 0:
            raise ProtocolError(f"{self._connection.url} keeps clients for {lease!r} seconds")
        return float(lease) / RENEWALS_A_LEASE

    def _leave(self) -> None:
        try:
            self._connection.request("DELETE", self._path, timeout=LEAVE_SECONDS)
        except EagleTargetError as error:
            logger.debug("%s was not told that this client leaves: %s", self._connection.url, error)
