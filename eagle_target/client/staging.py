"""Pinned memory between a socket and a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eagle_target.rows import RowStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.assembly import BatchAssembler
    from eagle_target.batch import Eagle3TargetBatch


class StagedSink:
    """A sink for an assembler: on the CPU the assembler's own stores, for a device pinned memory that is copied there.

    Args:
        assembler: what makes the batch. device: where the batch goes.
    """

    def __init__(self, assembler: BatchAssembler, device: torch.device) -> None:
        self._assembler = assembler
        self._direct = device.type == "cpu"
        self._staged: dict[str, torch.Tensor] = {}

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return the assembler's store, or a packed one in pinned memory."""
        if self._direct:
            return self._assembler.allocate(name, shape, dtype)
        self._staged[name] = torch.empty(tuple(shape), dtype=dtype, pin_memory=torch.cuda.is_available())
        return RowStore(self._staged[name])

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Hand a whole tensor on, wherever it lies."""
        self._assembler.put(name, rows)

    def finish(self) -> Eagle3TargetBatch:
        """Copy what is staged to the device, wait until the pinned memory can be used again, and return the batch."""
        staged = bool(self._staged)
        while self._staged:
            self._assembler.put(*self._staged.popitem())
        if staged and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return self._assembler.finish()
