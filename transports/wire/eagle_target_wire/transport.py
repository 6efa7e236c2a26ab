"""Both ends of the wire: no whole-body copy on either side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from eagle_target.errors import ConnectError, ProtocolError
from eagle_target.plugins.transport import ClientChannel, Reply, ServerChannel, ServerEndpoint, Transport

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from eagle_target.contract.sinks import Sink
    from eagle_target.plugins.options import PluginOptions
    from eagle_target.plugins.transport import ControlPlane, IncomingBody

CONTENT_TYPE = "application/vnd.safetensors"


class WireTransport(Transport):
    """safetensors in the HTTP response, streamed from and into the tensors' own memory."""

    name: ClassVar[str] = "wire"
    connectionless: ClassVar[bool] = True

    @classmethod
    def listen(cls, options: PluginOptions) -> ServerEndpoint:  # noqa: ARG003 - has none
        """Start the server's end."""
        return WireServerEndpoint()

    @classmethod
    def connect(
        cls,
        options: PluginOptions,  # noqa: ARG003 - has none
        offer: Mapping[str, Any],  # noqa: ARG003 - says nothing
        control: ControlPlane,  # noqa: ARG003 - is not needed
    ) -> ClientChannel:
        """Start the client's end."""
        return WireClientChannel()


class WireServerEndpoint(ServerEndpoint):
    """Accepts everybody: there is nothing to agree on."""

    def offer(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def accept(self, hello: Mapping[str, Any], *, reached_at: str) -> tuple[ServerChannel, dict[str, Any]]:  # noqa: ARG002
        """Return a channel without state."""
        return WireServerChannel(), {}


class WireServerChannel(ServerChannel):
    """Makes bodies whose parts are the tensors' own memory."""

    def send(
        self,
        transfer_id: str,  # noqa: ARG002 - the body is the transfer
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
    ) -> Reply:
        """Return the whole transfer as a body."""
        from eagle_target.protocol.tensors import encode_tensors

        return Reply(CONTENT_TYPE, encode_tensors(tensors, metadata))


class WireClientChannel(ClientChannel):
    """Reads bodies into the memory the sink gives."""

    def __init__(self) -> None:
        self._closed = False

    def receive(self, body: IncomingBody, sink: Sink) -> dict[str, str]:
        """Read one body; its sizes are checked against its length before memory is taken."""
        from eagle_target.protocol.tensors import PREFIX_BYTES, decode_header, header_length, writable_bytes

        if self._closed:
            raise ConnectError("this channel of transport 'wire' is closed: open another")
        if body.content_type != CONTENT_TYPE or body.length < PREFIX_BYTES:
            raise ProtocolError(
                f"the answer is {body.content_type!r} of {body.length} bytes, expected {CONTENT_TYPE!r}"
            )
        prefix = bytearray(PREFIX_BYTES)
        body.readinto(memoryview(prefix))
        header_end = PREFIX_BYTES + header_length(bytes(prefix))
        if header_end > body.length:
            raise ProtocolError(f"the answer has {body.length} bytes, its header alone would end at {header_end}")
        text = bytearray(header_end - PREFIX_BYTES)
        body.readinto(memoryview(text))
        header = decode_header(bytes(text), len(text))
        length = header_end + header.data_bytes
        if body.length != length:
            raise ProtocolError(f"the answer has {body.length} bytes, its header says {length}")
        for spec in header.specs:
            for view in sink.allocate(spec.name, spec.shape, spec.dtype).views():
                body.readinto(writable_bytes(view))
        return header.metadata

    def close(self) -> None:
        """Receive no more."""
        self._closed = True
