"""Messages between the adapter and its ranks: JSON over a Unix socket, tensors beside it in shared memory.

Every tensor is an anonymous file whose descriptor travels with the message, so nothing is left behind, whoever dies.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.contract.sinks import RowStore
from eagle_target.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eagle_target_sglang.pinned import PinnedCopier

LENGTH_BYTES = 8
# The kernel passes at most 253 descriptors at once.
FDS_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class DeviceRows(RowStore):
    """Rows on the CPU that are written from a device, where there is one."""

    copier: PinnedCopier | None = None

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Store `[m, ...]` as rows start to start + m, converted to the store's dtype."""
        if self.copier is None or rows.device.type == "cpu":
            RowStore.write(self, start, rows)
        else:
            self.copier.copy(self.out[start : start + len(rows)], rows)


class SharedTensors(dict[str, torch.Tensor]):
    """A sink whose tensors lie in shared memory, by name; sending it copies none of them.

    Args:
        copier: brings tensors of a device here; None where all are on the CPU.
    """

    def __init__(self, copier: PinnedCopier | None = None) -> None:
        super().__init__()
        self._copier = copier
        self.descriptors: dict[str, int] = {}

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return a new store in shared memory."""
        bytes_needed = _byte_count(shape, dtype)
        descriptor = os.memfd_create(f"eagle-target-{name}")
        self.descriptors[name] = descriptor
        os.ftruncate(descriptor, max(1, bytes_needed))
        self[name] = _map(descriptor, tuple(shape), dtype)
        return DeviceRows(self[name], copier=self._copier)

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Copy a whole tensor into shared memory."""
        self.allocate(name, rows.shape, rows.dtype).write(0, rows)

    def close(self) -> None:
        """Let go of the descriptors; the memory lives on in whoever has mapped it."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()
        self.clear()


def share(tensors: Mapping[str, torch.Tensor], copier: PinnedCopier | None = None) -> SharedTensors:
    """Copy tensors into shared memory, those of a device with a copier."""
    shared = SharedTensors(copier)
    for name, tensor in tensors.items():
        shared.put(name, tensor)
    return shared


def send_message(peer: socket.socket, header: Mapping[str, Any], tensors: SharedTensors | None = None) -> None:
    """Send JSON and tensors, and let go of the tensors.

    Raises:
        OSError: the peer is gone.
    """
    tensors = tensors if tensors is not None else SharedTensors()
    try:
        layout = [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()
        ]
        body = json.dumps({"header": dict(header), "tensors": layout}).encode()
        peer.sendall(len(body).to_bytes(LENGTH_BYTES, "little") + body)
        descriptors = [tensors.descriptors[name] for name in tensors]
        for start in range(0, len(descriptors), FDS_AT_ONCE):
            socket.send_fds(peer, [b"T"], descriptors[start : start + FDS_AT_ONCE])
    finally:
        tensors.close()


def receive_message(peer: socket.socket) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """Receive what `send_message` sent; None where the peer has closed.

    Raises:
        ProtocolError: the peer ended within a message. OSError: it was reset.
    """
    length = _receive_exactly(peer, LENGTH_BYTES, may_end=True)
    if length is None:
        return None
    message = json.loads(_receive_exactly(peer, int.from_bytes(length, "little")) or b"")
    layout = message["tensors"]
    descriptors: list[int] = []
    while len(descriptors) < len(layout):
        _, received, _, _ = socket.recv_fds(peer, 1, min(FDS_AT_ONCE, len(layout) - len(descriptors)))
        if not received:
            raise ProtocolError("a rank ended within a message")
        descriptors += received
    tensors = {}
    for (name, dtype, shape), descriptor in zip(layout, descriptors, strict=True):
        tensors[name] = _map(descriptor, tuple(shape), getattr(torch, dtype))
        os.close(descriptor)
    return message["header"], tensors


def _receive_exactly(peer: socket.socket, count: int, *, may_end: bool = False) -> bytes | None:
    received = bytearray()
    while len(received) < count:
        part = peer.recv(count - len(received))
        if not part:
            if may_end and not received:
                return None
            raise ProtocolError("a rank ended within a message")
        received += part
    return bytes(received)


def _map(descriptor: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    bytes_needed = _byte_count(shape, dtype)
    if not bytes_needed:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(descriptor, bytes_needed)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).reshape(shape)


def _byte_count(shape: Sequence[int], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count
