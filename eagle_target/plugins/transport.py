"""What a transport plugin is: two ends that move named tensors from a server to a client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from eagle_target.errors import TransportError
from eagle_target.plugins.options import PluginOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from eagle_target.contract.sinks import PackedTensors, Sink


@dataclass(frozen=True, slots=True)
class Reply:
    """The HTTP body that goes with a transfer: all of it (`wire`), or what the client needs to fetch the rest.

    moved_bytes: what travels beside the body.
    """

    content_type: str
    parts: Sequence[memoryview]
    moved_bytes: int = 0

    @property
    def length(self) -> int:
        """Bytes of all parts."""
        return sum(len(part) for part in self.parts)


class IncomingBody(Protocol):
    """The HTTP body of an answer, as the client reads it.

    deadline: `time.monotonic()` by which the transfer must be over, fetching the rest included.
    """

    content_type: str
    length: int
    deadline: float

    def readinto(self, buffer: memoryview) -> None:
        """Fill the whole buffer with the next bytes.

        Raises:
            ConnectError, TransferTimeout: the connection broke, or the deadline passed.
        """
        ...


class ControlPlane(Protocol):
    """How the client's end of one channel talks to the server's.

    address: host the server was reached at. is_private: nobody else can read or change what is said: it goes over TLS.
    device, target_device: where batches go, and where the target runs.
    """

    address: str
    is_private: bool
    device: str
    target_device: str

    def open_channel(self, hello: Mapping[str, Any]) -> Mapping[str, Any]:
        """Have the server accept the channel; returns what its `accept` answered. Once for each control plane."""
        ...

    def tell(self, message: Mapping[str, Any], *, timeout: float | None = None) -> Mapping[str, Any]:
        """Have the open channel's `answer` called; returns what it answered.

        Raises:
            TransportError: the server's end refused, or could not be reached within `timeout` seconds.
            ServerError: the server has no such channel any more.
        """
        ...


class ServerChannel(ABC):
    """The server's end of one client's connection.

    Closed by the server when the client closes it, or has not been heard of for a lease.
    """

    def new_tensors(self) -> PackedTensors:
        """Where a request's supervision is put: in memory the channel sends from without a copy, where it has such."""
        from eagle_target.contract.sinks import PackedTensors

        return PackedTensors()

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Answer what the client's end told: plain JSON data both ways. Called from any thread.

        Raises:
            TransportError: the message makes no sense here.
        """
        raise TransportError(f"this transport's channels take no messages, got {sorted(message)}")

    @abstractmethod
    def send(self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Reply:
        """Start a transfer and return the HTTP body for it. Called from any thread, several at a time.

        `tensors` is what `new_tensors` made, or any other mapping. Whoever needs them later keeps the mapping itself:
        the server counts supervision as waiting for its client as long as the mapping lives.

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
    def accept(self, hello: Mapping[str, Any], *, reached_at: str) -> tuple[ServerChannel, dict[str, Any]]:
        """Accept a client and return its channel and the answer to it.

        Args:
            hello: what the client says. reached_at: address of this machine at which its HTTP connection came in, the
                only one where a transport may listen for it unasked; empty for what a connectionless one shares.

        Raises:
            ConnectError: this client cannot use the transport, with the reason.
        """

    def close(self) -> None:
        """Release everything. Safe to call twice."""
        return


class ClientChannel(ABC):
    """The client's end of a connection to one server."""

    @property
    def broken(self) -> bool:
        """Whether the channel can carry nothing any more, so that another one must be opened."""
        return False

    @abstractmethod
    def receive(self, body: IncomingBody, sink: Sink) -> dict[str, str]:
        """Put the tensors of one transfer into the sink and return the metadata sent with them.

        A transport that reads into memory asks the sink to allocate it; one that owns tensors already puts them.
        Called from several threads at a time.

        Raises:
            ProtocolError: the body is not what `send` made. TransferTimeout: the deadline passed.
            ConnectError: the channel broke; where `broken` is set, the request is asked for again over another one.
        """

    def close(self) -> None:
        """Release the channel. Safe to call twice."""
        return


class Transport(ABC):
    """Moves tensors one way, from a server to its clients. The class is cheap: libraries are imported in use.

    name: what `--transport` takes. options_model: a `PluginOptions` with described fields.
    connectionless: every client shares one channel and none needs to be opened.
    rank: `auto` takes the usable transport of the highest rank that `auto_refusal` has nothing against.
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
    def auto_refusal(cls, control: ControlPlane) -> str | None:  # noqa: ARG003 - for transports that care
        """Why `auto` should pass this transport over between these two ends though it could work; None to take it."""
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
