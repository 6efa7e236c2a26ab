"""The transports a server offers and the channels its clients opened."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eagle_target.errors import ConfigError, TransportError
from eagle_target.plugins.options import build_model
from eagle_target.plugins.registry import unusable_reason
from eagle_target.protocol.problems import ProblemType

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eagle_target.errors import EagleTargetError
    from eagle_target.plugins.registry import Plugins
    from eagle_target.plugins.transport import ServerChannel, ServerEndpoint, Transport


logger = logging.getLogger(__name__)

CHECKS_A_LEASE = 4


@dataclass(slots=True, eq=False)
class OpenChannel:
    """A client's channel. heard_at: `time.monotonic()` of the client's last sign of life."""

    transport: str
    channel: ServerChannel
    heard_at: float


class Channels:
    """Offers transports and keeps open channels by id, each as long as its client is heard of.

    Args:
        plugins: where transports come from.
        names: transports to offer; `auto` means every one that is usable here.
        options: options by transport name. max_channels: open channels at a time.
        lease: seconds after which the channel of a client that is silent is closed.

    Raises:
        PluginError, TransportError, ConfigError: a named transport is unknown or unusable, or its options are wrong.
    """

    def __init__(
        self,
        plugins: Plugins,
        names: Sequence[str],
        options: Mapping[str, Mapping[str, Any]],
        *,
        max_channels: int,
        lease: float,
    ) -> None:
        self._max_channels = max_channels
        self._lease = lease
        self._lock = threading.Lock()
        self._open: dict[str, OpenChannel] = {}
        self._opening = 0
        self._closed = threading.Event()
        self._watch: threading.Thread | None = None
        self.expired: Counter[str] = Counter()
        self._endpoints: dict[str, ServerEndpoint] = {}
        self._shared: dict[str, ServerChannel] = {}
        for transport in _choose_transports(plugins, names):
            checked = build_model(
                transport.options_model, options.get(transport.name, {}), f"options of transport {transport.name!r}"
            )
            endpoint = transport.listen(checked)
            self._endpoints[transport.name] = endpoint
            if transport.connectionless:
                self._shared[transport.name], _ = endpoint.accept({}, reached_at="")
        unknown = {*options} - {*self._endpoints}
        if unknown:
            raise ConfigError(f"transport_options for {sorted(unknown)}, but offered are {sorted(self._endpoints)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The transports offered."""
        return tuple(self._endpoints)

    def count(self, name: str) -> int:
        """Open channels of a transport."""
        with self._lock:
            return sum(opened.transport == name for opened in self._open.values())

    def offers(self) -> dict[str, dict[str, Any]]:
        """What each transport tells every client."""
        return {name: endpoint.offer() for name, endpoint in self._endpoints.items()}

    def open(self, name: str, hello: Mapping[str, Any], *, reached_at: str) -> tuple[str, dict[str, Any]]:
        """Accept a client on a transport; returns the channel's id and the transport's answer, with the lease in it.

        Args:
            reached_at: address of this machine at which the client's connection came in.

        Raises:
            ServerError: the transport is not offered, or too many channels are open.
            ConnectError: the transport refused.
        """
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            raise _not_offered(name, self._endpoints)
        with self._lock:
            taken = len(self._open) + self._opening
            if taken >= self._max_channels:
                raise ProblemType.TOO_MANY_CHANNELS.error(
                    f"{taken} channels are open, this server holds {self._max_channels}: close some, or "
                    "raise max_channels"
                )
            self._opening += 1
        channel_id = secrets.token_urlsafe(16)
        try:
            channel, answer = endpoint.accept(hello, reached_at=reached_at)
            with self._lock:
                self._open[channel_id] = OpenChannel(name, channel, time.monotonic())
                self._start_watch()
        finally:
            with self._lock:
                self._opening -= 1
        return channel_id, {**answer, "lease_seconds": self._lease}

    def find(self, name: str, channel_id: str | None) -> ServerChannel:
        """The channel a request names, or the shared one of a connectionless transport.

        Raises:
            ServerError: the transport is not offered, or the channel is unknown.
        """
        if channel_id is None and name in self._shared:
            return self._shared[name]
        if name not in self._endpoints:
            raise _not_offered(name, self._endpoints)
        with self._lock:
            opened = self._open.get(channel_id or "")
            if opened is not None and opened.transport == name:
                opened.heard_at = time.monotonic()
                return opened.channel
        raise ProblemType.UNKNOWN_CHANNEL.error(
            f"this server has no open {name!r} channel {(channel_id or '')[:64]!r}: open one first"
        )

    def close_channel(self, name: str, channel_id: str) -> None:
        """Close a channel; one that is not there is closed already."""
        with self._lock:
            opened = self._open.get(channel_id)
            if opened is None or opened.transport != name:
                return
            del self._open[channel_id]
        opened.channel.close()

    def close(self) -> None:
        """Close every channel and transport. Safe to call twice."""
        self._closed.set()
        with self._lock:
            channels, self._open = list(self._open.values()), {}
            watch, self._watch = self._watch, None
        if watch is not None:
            watch.join()
        for opened in channels:
            opened.channel.close()
        for endpoint in self._endpoints.values():
            endpoint.close()

    def _start_watch(self) -> None:
        if self._watch is None and not self._closed.is_set():
            self._watch = threading.Thread(target=self._expire, name="eagle-target-leases", daemon=True)
            self._watch.start()

    def _expire(self) -> None:
        while not self._closed.wait(self._lease / CHECKS_A_LEASE):
            oldest = time.monotonic() - self._lease
            with self._lock:
                silent = {name: opened for name, opened in self._open.items() if opened.heard_at < oldest}
                for channel_id in silent:
                    del self._open[channel_id]
            for channel_id, opened in silent.items():
                logger.warning(
                    "closed %s channel %s: its client was silent for %g seconds",
                    opened.transport,
                    channel_id,
                    self._lease,
                )
                self.expired[opened.transport] += 1
                try:
                    opened.channel.close()
                except Exception:
                    # The other channels' leases go on, whatever this transport's end came to.
                    logger.exception("closing a %s channel failed", opened.transport)


def _choose_transports(plugins: Plugins, names: Sequence[str]) -> list[type[Transport]]:
    if list(names) == ["auto"]:
        usable = [origin.plugin for origin in plugins.transports if unusable_reason(origin.plugin) is None]
        return sorted(usable, key=lambda transport: -transport.rank)
    chosen = [plugins.transports.get(name) for name in names]
    for transport in chosen:
        reason = unusable_reason(transport)
        if reason is not None:
            raise TransportError(f"transport {transport.name!r} cannot work here: {reason}")
    return chosen


def _not_offered(name: str, offered: Mapping[str, object]) -> EagleTargetError:
    return ProblemType.TRANSPORT_NOT_OFFERED.error(f"transport {name[:64]!r} is not offered, only {sorted(offered)}")
