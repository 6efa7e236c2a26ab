"""Pinned memory between a socket and a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eagle_target.rows import RowStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.assembly import BatchAssembler


class StagedSink:
    """A sink whose stores are pinned CPU memory; `flush` copies them to the assembler's device."""

    def __init__(self, assembler: BatchAssembler) -> None:
        self._assembler = assembler
        self._staged: dict[str, torch.Tensor] = {}

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return a packed store in pinned memory."""
        self._staged[name] = torch.empty(tuple(shape), dtype=dtype, pin_memory=torch.cuda.is_available())
        return RowStore(self._staged[name])

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Hand a whole tensor on."""
        self._assembler.put(name, rows)

    def flush(self) -> None:
        """Copy everything to the device and wait for it, so that the pinned memory can be used again."""
        while self._staged:
            self._assembler.put(*self._staged.popitem())
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
