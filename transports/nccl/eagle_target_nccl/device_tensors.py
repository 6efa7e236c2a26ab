"""Supervision that stays on the GPU it was made on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eagle_target.contract.sinks import PackedTensors, RowStore

if TYPE_CHECKING:
    from collections.abc import Sequence


class DeviceTensors(PackedTensors):
    """Tensors in CUDA memory, and the streams on which they are made.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._streams: set[torch.cuda.Stream] = set()

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return a new packed store on the device."""
        self._streams.add(torch.cuda.current_stream(self._device))
        self[name] = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        return RowStore(self[name])

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Keep a tensor; part of a larger memory is copied, or a slow client would keep everybody's."""
        self._streams.add(torch.cuda.current_stream(rows.device if rows.is_cuda else self._device))
        super().put(name, rows if rows.untyped_storage().nbytes() <= rows.nbytes else rows.clone())

    def events(self) -> list[torch.cuda.Event]:
        """One for each stream, over when all that is queued there by now is."""
        return [stream.record_event() for stream in self._streams]
