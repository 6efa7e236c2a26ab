"""Both ends, joined by a shelf on which the server lays tensors and from which the client takes them."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import threading
from typing import TYPE_CHECKING, Any, ClassVar

from eagle_target.errors import ConnectError, ProtocolError
from eagle_target.plugins.transport import ClientChannel, Reply, ServerChannel, ServerEndpoint, Transport

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from eagle_target.contract.sinks import Sink
    from eagle_target.plugins.options import PluginOptions
    from eagle_target.plugins.transport import ControlPlane, IncomingBody

    Parcel = tuple[Mapping[str, torch.Tensor], dict[str, str]]

CONTENT_TYPE = "application/vnd.eagle-target.inprocess+json"
MAX_BODY_BYTES = 4096
PROCESS_NONCE = secrets.token_hex(16)


def process_identity() -> str:
    """A name no other process has; a forked child's differs from its parent's."""
    return f"{os.getpid()}-{PROCESS_NONCE}"


class Shelf:
    """Parcels of one channel, by transfer id."""

    def __init__(self) -> None:
        self._parcels: dict[str, Parcel] = {}
        self._lock = threading.Lock()
        self._closed = False

    def lay(self, transfer_id: str, parcel: Parcel) -> None:
        """Lay a parcel down for the client; after `clear` it is dropped."""
        with self._lock:
            if not self._closed:
                self._parcels[transfer_id] = parcel

    def take(self, transfer_id: str) -> Parcel:
        """Take a parcel.

        Raises:
            ProtocolError: there is none of that id.
        """
        with self._lock:
            if transfer_id not in self._parcels:
                raise ProtocolError(f"transfer {transfer_id!r} is not here: it was taken, or its channel closed")
            return self._parcels.pop(transfer_id)

    def clear(self) -> None:
        """Drop every parcel and take no more."""
        with self._lock:
            self._closed = True
            self._parcels.clear()


SHELVES: dict[str, Shelf] = {}


class InProcessTransport(Transport):
    """Hands tensors over by reference, between threads of one process."""

    name: ClassVar[str] = "inprocess"
    rank: ClassVar[int] = 100

    @classmethod
    def listen(cls, options: PluginOptions) -> ServerEndpoint:  # noqa: ARG003 - has none
        """Start the server's end."""
        return InProcessServerEndpoint()

    @classmethod
    def connect(
        cls,
        options: PluginOptions,  # noqa: ARG003 - has none
        offer: Mapping[str, Any],
        control: ControlPlane,
    ) -> ClientChannel:
        """Start the client's end, if the server is in this process."""
        if offer.get("process") != process_identity():
            raise ConnectError("the server runs in another process: use transport 'wire', or load the target here")
        answer = control.open_channel({"process": process_identity()})
        shelf = SHELVES.get(str(answer.get("shelf")))
        if shelf is None:
            raise ConnectError(f"the server named no shelf of this process: {dict(answer)}")
        return InProcessClientChannel(shelf)


class InProcessServerEndpoint(ServerEndpoint):
    """Makes a shelf for each client of this process."""

    def offer(self) -> dict[str, Any]:
        """Which process this is."""
        return {"process": process_identity()}

    def accept(self, hello: Mapping[str, Any], *, reached_at: str) -> tuple[ServerChannel, dict[str, Any]]:  # noqa: ARG002
        """Make a shelf for a client of this process."""
        if hello.get("process") != process_identity():
            raise ConnectError("transport 'inprocess' needs client and server in one process: use 'wire'")
        channel = InProcessServerChannel(secrets.token_hex(8))
        return channel, {"shelf": channel.shelf_name}


class InProcessServerChannel(ServerChannel):
    """Lays tensors on one client's shelf."""

    def __init__(self, shelf_name: str) -> None:
        self.shelf_name = shelf_name
        self._names = itertools.count(1)
        self._shelf = SHELVES[shelf_name] = Shelf()

    def send(self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Reply:
        """Lay the tensors down and tell the client under which id."""
        # A client that uses an id twice gets no other answer's tensors for it.
        name = f"{transfer_id}/{next(self._names)}"
        self._shelf.lay(name, (tensors, dict(metadata)))
        moved = sum(tensor.nbytes for tensor in tensors.values())
        return Reply(CONTENT_TYPE, [memoryview(json.dumps({"transfer_id": name}).encode())], moved)

    def close(self) -> None:
        """Clear the shelf."""
        self._shelf.clear()
        SHELVES.pop(self.shelf_name, None)


class InProcessClientChannel(ClientChannel):
    """Takes tensors from the shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def receive(self, body: IncomingBody, sink: Sink) -> dict[str, str]:
        """Take one transfer's tensors, the very ones the server made."""
        if body.content_type != CONTENT_TYPE or not 0 < body.length <= MAX_BODY_BYTES:
            raise ProtocolError(
                f"the answer is {body.content_type!r} of {body.length} bytes, expected {CONTENT_TYPE!r}"
            )
        text = bytearray(body.length)
        body.readinto(memoryview(text))
        try:
            transfer_id = str(json.loads(text)["transfer_id"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProtocolError(f"the answer names no transfer: {bytes(text)!r}") from error
        tensors, metadata = self._shelf.take(transfer_id)
        for name, tensor in tensors.items():
            sink.put(name, tensor)
        return metadata

    def close(self) -> None:
        """Clear the shelf."""
        self._shelf.clear()
