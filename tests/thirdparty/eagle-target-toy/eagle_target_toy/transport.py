"""The transport `toyfile`: each transfer is one safetensors file in a folder of the channel's own."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from pydantic import Field

from eagle_target.plugins import (
    ClientChannel,
    ConnectError,
    PluginOptions,
    ProtocolError,
    Reply,
    ServerChannel,
    ServerEndpoint,
    Transport,
    TransportError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from eagle_target.plugins import ControlPlane, IncomingBody, Sink

CONTENT_TYPE = "application/vnd.eagle-target.toyfile+json"
MAX_TICKET_BYTES = 1024
NONCE_FILE = "nonce"
FILE_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


class ToyFileOptions(PluginOptions):
    """Options of the `toyfile` transport."""

    folder: Path | None = Field(
        default=None, description="Folder that server and clients see under the same path; default a temporary one."
    )


class ToyFileTransport(Transport):
    """Files in a folder that both ends see."""

    name: ClassVar[str] = "toyfile"
    options_model: ClassVar[type[PluginOptions]] = ToyFileOptions
    rank: ClassVar[int] = -10

    @classmethod
    def listen(cls, options: PluginOptions) -> ServerEndpoint:
        """Start the server's end."""
        return ToyFileServerEndpoint(options.folder if isinstance(options, ToyFileOptions) else None)

    @classmethod
    def connect(
        cls,
        options: PluginOptions,
        offer: Mapping[str, Any],
        control: ControlPlane,
    ) -> ClientChannel:
        """Start the client's end, if it sees the server's folder."""
        root = Path(str(offer.get("root")))
        if _read_nonce(root) != offer.get("nonce"):
            raise ConnectError(f"this machine does not see the server's folder {root}: use transport 'wire'")
        answer = control.open_channel({"nonce": offer["nonce"]})
        return ToyFileClientChannel(root / Path(str(answer.get("folder"))).name)


class ToyFileServerEndpoint(ServerEndpoint):
    """A folder with one folder for each channel."""

    def __init__(self, folder: Path | None) -> None:
        self._nonce = secrets.token_hex(16)
        self._root = Path(tempfile.mkdtemp(prefix="eagle-target-toyfile-", dir=folder))
        (self._root / NONCE_FILE).write_text(self._nonce, encoding="ascii")

    def offer(self) -> dict[str, Any]:
        """Where the folder is, and how a client knows that it is the same one."""
        return {"root": str(self._root), "nonce": self._nonce}

    def accept(self, hello: Mapping[str, Any], *, reached_at: str) -> tuple[ServerChannel, dict[str, Any]]:
        """Make a folder for a client."""
        if hello.get("nonce") != self._nonce:
            raise ConnectError("transport 'toyfile' needs a folder that both ends see: use 'wire'")
        folder = Path(tempfile.mkdtemp(dir=self._root))
        return ToyFileServerChannel(folder), {"folder": folder.name}

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._root, ignore_errors=True)


class ToyFileServerChannel(ServerChannel):
    """Writes files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def send(self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Reply:
        """Write the tensors and tell the client where."""
        from eagle_target.plugins import encode_tensors

        path = self._folder / f"{secrets.token_hex(16)}.safetensors"
        parts = encode_tensors(tensors, metadata)
        try:
            with path.open("wb") as file:
                for part in parts:
                    file.write(part)
        except OSError as error:
            raise TransportError(f"transfer {transfer_id!r} could not be written to {path}: {error}") from error
        ticket = {"file": path.name, "bytes": sum(len(part) for part in parts)}
        return Reply(CONTENT_TYPE, [memoryview(json.dumps(ticket).encode())])

    def close(self) -> None:
        """Remove the folder, and what was never received."""
        shutil.rmtree(self._folder, ignore_errors=True)


class ToyFileClientChannel(ClientChannel):
    """Reads files and removes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._closed = False

    def receive(self, body: IncomingBody, sink: Sink) -> dict[str, str]:
        """Read the file that the body names."""
        name, size = _read_ticket(body)
        if self._closed:
            raise ConnectError("this channel of transport 'toyfile' is closed: open another")
        path = self._folder / name
        try:
            with path.open("rb") as file:
                metadata = _read_tensors(file, size, sink)
        except OSError as error:
            raise TransportError(f"{path} cannot be read: {error}") from error
        with contextlib.suppress(OSError):
            path.unlink()
        return metadata

    def close(self) -> None:
        """Receive no more."""
        self._closed = True


def _read_ticket(body: IncomingBody) -> tuple[str, int]:
    if body.content_type != CONTENT_TYPE or not 0 < body.length <= MAX_TICKET_BYTES:
        raise ProtocolError(f"the answer is {body.content_type!r} of {body.length} bytes, expected {CONTENT_TYPE!r}")
    text = bytearray(body.length)
    body.readinto(memoryview(text))
    try:
        ticket = json.loads(text)
        name, size = str(ticket["file"]), int(ticket["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"the answer names no file: {bytes(text[:80])!r}") from error
    if not FILE_NAME.fullmatch(name):
        raise ProtocolError(f"the answer names {name!r}, which is no file of a channel")
    return name, size


def _read_tensors(file: BinaryIO, size: int, sink: Sink) -> dict[str, str]:
    from eagle_target.plugins import PREFIX_BYTES, decode_header, header_length, writable_bytes

    length = header_length(file.read(PREFIX_BYTES))
    header = decode_header(file.read(length), length)
    if PREFIX_BYTES + length + header.data_bytes != size:
        raise ProtocolError(f"{file.name} has tensors of {header.data_bytes} bytes in a transfer of {size}")
    for spec in header.specs:
        for view in sink.allocate(spec.name, spec.shape, spec.dtype).views():
            wanted = writable_bytes(view)
            if len(wanted) and file.readinto(wanted) != len(wanted):  # type: ignore[attr-defined]
                raise ProtocolError(f"{file.name} ends inside {spec.name!r}")
    return header.metadata


def _read_nonce(root: Path) -> str | None:
    try:
        return (root / NONCE_FILE).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
