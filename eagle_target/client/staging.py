"""Pinned memory between a socket and a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eagle_target.rows import RowStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.assembly import BatchAssembler
    from eagle_target.batch import Eagle3TargetBatch
    from eagle_target.rows import Allocate


class StagedSink:
    """A sink for an assembler: on the CPU the assembler's own stores, for a device pinned memory that is copied there.

    Args:
        assembler: what makes the batch. device: where the batch goes. allocate: makes pinned memory.
    """

    def __init__(self, assembler: BatchAssembler, device: torch.device, allocate: Allocate) -> None:
        self._assembler = assembler
        self._allocate = allocate
        self._device = device
        self._direct = device.type == "cpu"
        self._staged: dict[str, torch.Tensor] = {}

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return the assembler's store, or a packed one in pinned memory."""
        if self._direct:
            return self._assembler.allocate(name, shape, dtype)
        self._staged[name] = self._allocate(shape, dtype)
        return RowStore(self._staged[name])

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Hand a whole tensor on, wherever it lies."""
        self._assembler.put(name, rows)

    def finish(self) -> Eagle3TargetBatch:
        """Copy what is staged to the device, wait until the pinned memory can be used again, and return the batch."""
        try:
            for name, rows in self._staged.items():
                self._assembler.put(name, rows)
        finally:
            if self._staged and self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        # Not before: others may write to the memory from now on.
        self._staged.clear()
        return self._assembler.finish()
