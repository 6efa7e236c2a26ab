"""What a client tells a server while it has nothing to ask: that it is there, and that its channels are used."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from eagle_target.errors import EagleTargetError, ProtocolError, ServerError
from eagle_target.protocol import messages
from eagle_target.protocol.problems import ProblemType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.client.http import ServerConnection

logger = logging.getLogger(__name__)

# Until a server has told its lease, and how many renewals of it may be lost in a row.
FIRST_PAUSE_SECONDS = 5.0
RENEWALS_A_LEASE = 3
# A client that ends does not wait long for a server to hear of it.
LEAVE_SECONDS = 2.0


class Lease:
    """Renews a client's presence at one server, and its channels there, on a thread of its own.

    A server keeps both for the same seconds and hears of each by itself: a client whose channels carry nothing must
    name them.

    Args:
        connection: HTTP to the server; a client without an id has no presence.
    """

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._path = f"{messages.CLIENTS}/{quote(connection.client_id, safe='')}" if connection.client_id else ""
        self._is_there = True
        self._changed = threading.Condition()
        self._channels: set[ChannelControl] = set()
        self._period = FIRST_PAUSE_SECONDS
        self._due = 0.0
        self._ended = False
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """The server has answered: have it know from now on that this client is there. Safe to call again."""
        if self._path and self._thread is None:
            self._renew_within(FIRST_PAUSE_SECONDS)

    def keep(self, channel: ChannelControl, seconds: float) -> None:
        """Renew a channel too, whose lease is so many seconds, until `drop`."""
        with self._changed:
            self._channels.add(channel)
            self._period = seconds / RENEWALS_A_LEASE
        self._renew_within(self._period)

    def drop(self, channel: ChannelControl) -> None:
        """Renew a channel no longer."""
        with self._changed:
            self._channels.discard(channel)

    def end(self) -> None:
        """Say that this client leaves, if the server can be told. Safe to call twice."""
        with self._changed:
            self._ended = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join(LEAVE_SECONDS)

    def _renew_within(self, seconds: float) -> None:
        with self._changed:
            due = time.monotonic() + seconds
            if self._thread is None and not self._ended:
                self._due = due
                self._thread = threading.Thread(target=self._run, name="eagle-target-lease", daemon=True)
                self._thread.start()
            self._due = min(self._due, due)
            self._changed.notify()

    def _run(self) -> None:
        while self._wait_until_due():
            with self._changed:
                channels = list(self._channels)
            for channel in channels:
                channel.renew(self._patience)
                if channel.lost:
                    self.drop(channel)
            if self._path:
                self._renew_presence()
            with self._changed:
                self._due = time.monotonic() + self._period
        # Here and not in `end`: a renewal that is under way must not arrive after the leave.
        if self._path and self._is_there:
            self._leave()

    def _wait_until_due(self) -> bool:
        """True when it is time to renew, False at the end."""
        with self._changed:
            while not self._ended:
                left = self._due - time.monotonic()
                if left <= 0:
                    return True
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
        return False

    @property
    def _patience(self) -> float:
        # One that is lost must leave time for the next.
        return max(self._period, LEAVE_SECONDS)

    def _renew_presence(self) -> None:
        try:
            answer = self._connection.request_json("PUT", self._path, timeout=self._patience)
            seconds = messages.read_json_object(answer, "the answer to a presence").get("lease_seconds")
            if not isinstance(seconds, int | float) or seconds <= 0:
                raise ProtocolError(f"{self._connection.url} keeps clients for {seconds!r} seconds")
        except EagleTargetError as error:
            if isinstance(error, ServerError) and error.problem == ProblemType.NOT_FOUND:
                self._path = ""  # an older server, which knows of no such thing
            self._is_there = False
            logger.debug("%s was not told that this client is there: %s", self._connection.url, error)
        else:
            self._is_there = True
            self._period = seconds / RENEWALS_A_LEASE

    def _leave(self) -> None:
        try:
            self._connection.request("DELETE", self._path, timeout=LEAVE_SECONDS).close()
        except EagleTargetError as error:
            logger.debug("%s was not told that this client leaves: %s", self._connection.url, error)


class ChannelControl:
    """A `ControlPlane` over HTTP.

    Args:
        connection: HTTP to the server. transport: whose channel it is. lease: keeps the channel while it is open.
        device: where batches go. target_device: where the target runs.

    Attributes:
        channel_id: what the server calls the channel; None before it is open, or where none is needed.
        lost: True when the server has no such channel any more.
    """

    def __init__(
        self, connection: ServerConnection, transport: str, lease: Lease, *, device: str, target_device: str
    ) -> None:
        self._connection = connection
        self._lease = lease
        self._is_given_up = False
        self.transport = transport
        parts = urlsplit(connection.url)
        self.address = parts.hostname or ""
        self.is_private = parts.scheme == "https"
        self.device = device
        self.target_device = target_device
        self.channel_id: str | None = None
        self.lost = False

    def open_channel(self, hello: Mapping[str, Any]) -> Mapping[str, Any]:
        """Have the server accept the channel, and keep it from now on.

        Raises:
            ProtocolError: the answer names no channel or no lease.
        """
        answer = self._connection.request_json("POST", f"{messages.TRANSPORTS}/{self.transport}/channels", hello)
        reply = messages.read_json_object(answer, "the answer to opening a channel")
        channel_id, seconds = reply.pop("channel", None), reply.pop("lease_seconds", None)
        if not isinstance(channel_id, str) or not isinstance(seconds, int | float) or seconds <= 0:
            raise ProtocolError(
                f"{self._connection.url} opened channel {channel_id!r} with a lease of {seconds!r} seconds"
            )
        self.channel_id = channel_id
        self._lease.keep(self, seconds)
        return reply

    def tell(self, message: Mapping[str, Any], *, timeout: float | None = None) -> Mapping[str, Any]:
        """Have the channel's `answer` called; returns what it answered."""
        answer = self._connection.request_json("POST", f"{self._path}/messages", message, timeout=timeout)
        return messages.read_json_object(answer, "the answer to a channel's message")

    def renew(self, timeout: float) -> None:
        """Tell the server that the channel is used, if it can be told within so many seconds."""
        try:
            self._connection.request("PUT", self._path, timeout=timeout).close()
        except EagleTargetError as error:
            if isinstance(error, ServerError) and error.problem == ProblemType.UNKNOWN_CHANNEL:
                self.lost = True
            logger.debug("the lease of channel %s was not renewed: %s", self.channel_id, error)

    def give_up(self) -> None:
        """Tell the server that the channel is not used any more, if it can be told. Safe to call twice."""
        self._lease.drop(self)
        if self._is_given_up or self.channel_id is None or self.lost:
            return
        self._is_given_up = True
        try:
            self._connection.request("DELETE", self._path, timeout=LEAVE_SECONDS).close()
        except EagleTargetError as error:
            logger.debug("channel %s of %s was not closed: %s", self.channel_id, self._connection.url, error)

    @property
    def _path(self) -> str:
        return f"{messages.TRANSPORTS}/{self.transport}/channels/{self.channel_id}"
