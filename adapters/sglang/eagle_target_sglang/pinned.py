"""From a device to memory that is not pinned, through two pinned buffers that take turns."""

from __future__ import annotations

import torch

from eagle_target.memory import PinnedPool

BUFFER_BYTES = 16 << 20


class PinnedCopier:
    """Copies tensors of one device to the CPU at the bus's speed; one thread at a time.

    Memory that other processes map is not pinned. A piece travels while the one before it is copied on from its buffer.

    Args:
        device: where the tensors lie. buffer_bytes: of each of the two buffers, which are taken at the first copy.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._buffers: list[torch.Tensor] = []
        self._pool = PinnedPool(device, slab_bytes=2 * buffer_bytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a tensor into a contiguous one on the CPU of the same shape, converted to its dtype."""
        if not self._buffers:
            allocate = self._pool.allocate if self._device.type == "cuda" else torch.empty
            self._buffers = [allocate((self._buffer_bytes,), dtype=torch.uint8) for _ in range(2)]
        pieces = torch.split(_bytes_of(source.to(target.dtype)), self._buffer_bytes)
        places = torch.split(_bytes_of(target), self._buffer_bytes)
        previous: tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None] | None = None
        for number, (piece, place) in enumerate(zip(pieces, places, strict=True)):
            buffer = self._buffers[number % 2][: len(piece)]
            arrived = self._send(buffer, piece)
            if previous is not None:
                _store(*previous)
            previous = (place, buffer, arrived)
        if previous is not None:
            _store(*previous)

    def _send(self, buffer: torch.Tensor, piece: torch.Tensor) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            buffer.copy_(piece)
            return None
        with torch.cuda.device(self._device):
            buffer.copy_(piece, non_blocking=True)
            arrived: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return arrived


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _store(place: torch.Tensor, buffer: torch.Tensor, arrived: torch.cuda.Event | None) -> None:
    if arrived is not None:
        arrived.synchronize()
    place.copy_(buffer)
