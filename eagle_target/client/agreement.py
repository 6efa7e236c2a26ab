"""Which transport a client and a server use: the first that both ends can, in the order that was asked for."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eagle_target.client.control import ChannelControl
from eagle_target.errors import ConnectError, TransportRefused
from eagle_target.options import build_model
from eagle_target.plugins import unusable_reason

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from eagle_target.client.connection import ServerConnection
    from eagle_target.plugins import Plugins
    from eagle_target.protocol import Handshake
    from eagle_target.transports import ClientChannel, Transport

logger = logging.getLogger(__name__)

AUTO = ("auto",)


@dataclass(slots=True, eq=False)
class Agreement:
    """An open channel.

    refused: why each better transport is not used, by name. users: requests that hold it.
    retired: no further request takes it; it is ended when the last user is done.
    """

    transport: str
    channel: ClientChannel
    control: ChannelControl
    refused: dict[str, str]
    users: int = 0
    retired: bool = False

    def end(self) -> None:
        """Close both ends, as far as the server can be told. Safe to call twice."""
        self.channel.close()
        self.control.give_up()


class Negotiator:
    """Opens channels to one server.

    Args:
        connection: HTTP to it. plugins: where transports come from.
        transports: names in order of preference; `auto` for the best both ends have.
        transport_options: options by transport name. device: where batches go.
    """

    def __init__(
        self,
        connection: ServerConnection,
        *,
        plugins: Plugins,
        transports: Sequence[str],
        transport_options: Mapping[str, Mapping[str, Any]],
        device: str,
    ) -> None:
        self._connection = connection
        self._plugins = plugins
        self._auto = tuple(transports) == AUTO
        self._transports = transports
        self._transport_options = transport_options
        self._device = device

    @property
    def has_choice(self) -> bool:
        """Whether a transport that breaks may be stepped down from."""
        return self._auto or len(self._transports) > 1

    def agree(self, handshake: Handshake, *, without: Collection[str] = ()) -> Agreement:
        """Open a channel on the first transport that works.

        Args:
            handshake: what the server offers. without: transports not to try; they broke just now.

        Raises:
            TransportRefused: none works, with the reason of each.
        """
        refused: dict[str, str] = {}
        for transport in self._candidates(handshake.transports):
            name = transport.name
            control = ChannelControl(self._connection, name, device=self._device, target_device=handshake.target.device)
            if name in without:
                refused[name] = "its channel broke"
                continue
            reason = self._refusal(transport, handshake, control)
            if reason is None:
                try:
                    channel = transport.connect(self._options(transport), handshake.transports[name], control)
                except ConnectError as error:
                    reason = str(error)
                    control.give_up()
                except BaseException:
                    control.give_up()
                    raise
                else:
                    return self._agreed(Agreement(name, channel, control, refused))
            refused[name] = reason
        raise TransportRefused(
            f"no transport to {self._connection.url} works: {refused}, it offers {sorted(handshake.transports)}"
        )

    def _agreed(self, agreement: Agreement) -> Agreement:
        if agreement.refused:
            level = logging.INFO if self._auto else logging.WARNING
            logger.log(
                level, "%s: using transport %r; %s", self._connection.url, agreement.transport, agreement.refused
            )
        return agreement

    def _refusal(self, transport: type[Transport], handshake: Handshake, control: ChannelControl) -> str | None:
        if transport.name not in handshake.transports:
            return f"{self._connection.url} does not offer it"
        reason = unusable_reason(transport)
        return transport.auto_refusal(control) if reason is None and self._auto else reason

    def _options(self, transport: type[Transport]) -> Any:
        options = self._transport_options.get(transport.name, {})
        return build_model(transport.options_model, options, f"options of transport {transport.name!r}")

    def _candidates(self, offers: Mapping[str, object]) -> list[type[Transport]]:
        if not self._auto:
            return [self._plugins.transports.get(name) for name in self._transports]
        here = [origin.plugin for origin in self._plugins.transports if origin.plugin.name in offers]
        return sorted(here, key=lambda transport: -transport.rank)
