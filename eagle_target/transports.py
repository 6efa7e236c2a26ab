"""What a transport plugin is: two ends that move named tensors from a server to a client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from eagle_target.options import PluginOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from eagle_target.rows import Sink


@dataclass(frozen=True, slots=True)
class Reply:
    """The HTTP body that goes with a transfer: all of it (`wire`), or what the client needs to fetch the rest."""

    content_type: str
    parts: Sequence[memoryview]

    @property
    def length(self) -> int:
        """Bytes of all parts."""
        return sum(len(part) for part in self.parts)


class IncomingBody(Protocol):
    """The HTTP body of an answer, as the client reads it."""

    content_type: str
    length: int

    def readinto(self, buffer: memoryview) -> None:
        """Fill the whole buffer with the next bytes.

        Raises:
            ConnectError, TransferTimeout: the connection broke, or the deadline passed.
        """
        ...


class ControlPlane(Protocol):
    """How the two ends of a transport agree before the first transfer."""

    def open_channel(self, transport: str, hello: Mapping[str, Any]) -> Mapping[str, Any]:
        """Have the server accept a channel; returns what its `accept` answered."""
        ...


class ServerChannel(ABC):
    """The server's end of one client's connection."""

    @abstractmethod
    def send(self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Reply:
        """Start a transfer and return the HTTP body for it. Called from any thread, several at a time.

        Raises:
            TransportError: the tensors cannot be sent this way.
        """

    def close(self) -> None:
        """Release the channel and what waits in it. Safe to call twice."""
        return


class ServerEndpoint(ABC):
    """A transport in a running server."""

    @abstractmethod
    def offer(self) -> dict[str, Any]:
        """What the handshake tells every client about this transport: plain JSON data."""

    @abstractmethod
    def accept(self, hello: Mapping[str, Any]) -> tuple[ServerChannel, dict[str, Any]]:
        """Accept a client and return its channel and the answer to it.

        Raises:
            ConnectError: this client cannot use the transport, with the reason.
        """

    def close(self) -> None:
        """Release everything. Safe to call twice."""
        return


class ClientChannel(ABC):
    """The client's end of a connection to one server."""

    @abstractmethod
    def receive(self, body: IncomingBody, sink: Sink) -> dict[str, str]:
        """Put the tensors of one transfer into the sink and return the metadata sent with them.

        A transport that reads into memory asks the sink to allocate it; one that owns tensors already puts them.
        Called from several threads at a time.

        Raises:
            ProtocolError: the body is not what `send` made. TransferTimeout: the deadline passed.
        """

    def close(self) -> None:
        """Release the channel. Safe to call twice."""
        return


class Transport(ABC):
    """Moves tensors one way, from a server to its clients. The class is cheap: libraries are imported in use.

    name: what `--transport` takes. options_model: a `PluginOptions` with described fields.
    connectionless: every client shares one channel and none needs to be opened.
    rank: `auto` takes the usable transport of the highest rank.
    """

    name: ClassVar[str]
    options_model: ClassVar[type[PluginOptions]] = PluginOptions
    connectionless: ClassVar[bool] = False
    rank: ClassVar[int] = 0

    @classmethod
    def version(cls) -> str | None:
        """Version of the library underneath, where there is one."""
        return None

    @classmethod
    def unusable_reason(cls) -> str | None:
        """Why the transport cannot work on this machine, with the remedy; None where it can."""
        return None

    @classmethod
    @abstractmethod
    def listen(cls, options: PluginOptions) -> ServerEndpoint:
        """Start the server's end."""

    @classmethod
    @abstractmethod
    def connect(cls, options: PluginOptions, offer: Mapping[str, Any], control: ControlPlane) -> ClientChannel:
        """Start the client's end for one server, given that server's offer.

        Raises:
            ConnectError: the two ends cannot use this transport, with the reason.
        """
