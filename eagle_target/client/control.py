"""The control plane of one channel: opened over HTTP, kept by a lease, given up at the end."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from eagle_target import protocol
from eagle_target.errors import EagleTargetError, ProtocolError, ServerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.client.connection import ServerConnection

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
        answer = self._connection.request_json("POST", f"{protocol.TRANSPORTS}/{self.transport}/channels", hello)
        reply = protocol.read_json_object(answer, "the answer to opening a channel")
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
        return protocol.read_json_object(answer, "the answer to a channel's message")

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
        return f"{protocol.TRANSPORTS}/{self.transport}/channels/{self.channel_id}"

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
