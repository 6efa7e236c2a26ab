"""Where rows of a tensor go: packed, or scattered over a larger tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Allocate = Callable[[Sequence[int], torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True)
class RowStore:
    """Rows `[n, ...]` that live in `out`.

    out: `[n, ...]`, or `[slots, ...]` when positions is given.
    positions: ascending int64 `[n]` on the CPU, the slot of each row; None when row i is slot i.
    non_blocking: whether copies from a device into pinned memory are waited for by whoever uses the store.
    """

    out: torch.Tensor
    positions: torch.Tensor | None = None
    non_blocking: bool = False

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Store `[m, ...]` as rows start to start + m, converted to the store's dtype."""
        if self.positions is None:
            self.out[start : start + len(rows)].copy_(rows, non_blocking=self.non_blocking)
            return
        slots = self.positions[start : start + len(rows)]
        if self.out.device.type != "cpu":
            self.out.index_copy_(0, slots.to(self.out.device), rows.to(self.out.device, self.out.dtype))
            return
        for slot, row, length in contiguous_runs(slots):
            self.out[slot : slot + length].copy_(rows[row : row + length], non_blocking=self.non_blocking)

    def views(self) -> list[torch.Tensor]:
        """Views of `out` that are contiguous each and, one after another, hold all rows."""
        if self.positions is None:
            return [self.out]
        return [self.out[slot : slot + length] for slot, _, length in contiguous_runs(self.positions)]


class Sink(Protocol):
    """Takes named tensors of `[rows, ...]`: whole, or written in parts to the store it allocates."""

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return the store to write `[rows, ...]` to."""
        ...

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Take a whole tensor, by reference where the sink can use it as it is."""
        ...


class PackedTensors(dict[str, torch.Tensor]):
    """A sink that keeps every tensor packed, by name: what a server sends."""

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return a new packed store on the CPU."""
        self[name] = torch.empty(tuple(shape), dtype=dtype)
        return RowStore(self[name])

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Keep the tensor itself."""
        self[name] = rows


def contiguous_runs(positions: torch.Tensor) -> list[tuple[int, int, int]]:
    """Split ascending `[n]` slots into runs of neighbours: (first slot, first row, length) each."""
    if not len(positions):
        return []
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    rows = [0, *breaks.tolist(), len(positions)]
    slots = positions[torch.tensor(rows[:-1])].tolist()
    return [(slot, row, end - row) for slot, row, end in zip(slots, rows[:-1], rows[1:], strict=True)]


def scattered_store(
    slots: int, shape: Sequence[int], dtype: torch.dtype, positions: torch.Tensor, allocate: Allocate
) -> RowStore:
    """Store for `[n, ...]` rows in a new `[slots, ...]` whose other slots are zero."""
    out = allocate((slots, *shape[1:]), dtype)
    end = 0
    for slot, _, length in contiguous_runs(positions):
        out[end:slot].zero_()
        end = slot + length
    out[end:].zero_()
    return RowStore(out, positions)
