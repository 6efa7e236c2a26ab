"""Memory that the processes of an engine share without pickling and without a name.

Anonymous, so nothing is left behind whoever crashes, and no limit of /dev/shm applies.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from eagle_target.contract.sinks import RowStore
from eagle_target.shared_memory import SharedBlock

if TYPE_CHECKING:
    import mmap
    from collections.abc import Mapping, Sequence
    from typing import Self

    from eagle_target.contract.request import TensorSpec

    # pid, descriptor and size of a block: what another process of the same user needs to open it. The last is the
    # block's number, by which it can be kept open; 0 for a block of one call.
    Address = tuple[int, int, int, int]
    # name, offset, shape and dtype of a tensor in a block, as plain values.
    PlainSlot = tuple[str, int, list[int], str]

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies in a block."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def plain(self) -> PlainSlot:
        """As values that any serialiser takes."""
        return self.name, self.offset, list(self.shape), str(self.dtype).removeprefix("torch.")

    def tensor(self, memory: mmap.mmap | memoryview) -> torch.Tensor:
        """The tensor that lies here in a block's memory, which it keeps alive."""
        count = math.prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.offset).view(self.shape)

    @classmethod
    def read(cls, plain: PlainSlot) -> Slot:
        """From `plain()`, tuples as lists or not."""
        name, offset, shape, dtype = plain
        return cls(name, offset, tuple(shape), getattr(torch, dtype))


class Layout:
    """Places tensors one after another in a block that is not there yet."""

    def __init__(self) -> None:
        self.size = 0

    def add(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Slot:
        """Place a tensor."""
        slot = Slot(name, self.size, tuple(shape), dtype)
        length = math.prod(slot.shape) * dtype.itemsize
        self.size += -(-length // ALIGNMENT) * ALIGNMENT
        return slot

    def place(self, spec: Mapping[str, TensorSpec]) -> list[Slot]:
        """Place the tensors of an answer."""
        return [self.add(name, each.shape, each.dtype) for name, each in spec.items()]


class EngineBlock(SharedBlock):
    """A block of memory that the engine's processes open by its address."""

    @property
    def address(self) -> Address:
        """What `open_address` takes."""
        return os.getpid(), self.descriptor, self.size, 0

    @classmethod
    def open_address(cls, address: Address) -> Self:
        """Map a block of this or another process."""
        pid, descriptor, size, _ = address
        block = cls.open(pid, descriptor, size)
        block.release()
        return block

    def tensor(self, slot: Slot) -> torch.Tensor:
        """The tensor of a slot, in the block's memory."""
        return slot.tensor(self.map)


class BlockSink:
    """A `Sink` whose tensors lie in a block, each where it was placed.

    Args:
        block: the block. slots: what was placed.
        is_pinned: whether copies from a device go on while the caller does; the caller then waits for the device.
    """

    def __init__(self, block: EngineBlock, slots: Sequence[Slot], *, is_pinned: bool = False) -> None:
        self._tensors = {slot.name: block.tensor(slot) for slot in slots}
        self._is_pinned = is_pinned

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return the store that was placed for a name."""
        tensor = self._tensors[name]
        if tensor.shape != torch.Size(shape) or tensor.dtype != dtype:
            raise ValueError(f"{name} was placed as {tensor.dtype} {list(tensor.shape)}, not as {dtype} {list(shape)}")
        return RowStore(tensor, non_blocking=self._is_pinned)

    def rows(self, name: str) -> torch.Tensor:
        """The tensor that was placed under a name."""
        return self._tensors[name]

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Copy a tensor to its place, unless it was made there."""
        tensor = self._tensors[name]
        if tensor.data_ptr() != rows.data_ptr():
            tensor.copy_(rows, non_blocking=self._is_pinned)
