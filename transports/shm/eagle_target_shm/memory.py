"""The server's memory for one client: tensors that lie in it already, and loans of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from eagle_target.contract.sinks import PackedTensors, RowStore
from eagle_target.protocol.problems import ProblemType
from eagle_target_shm.cuda import DeviceSegment
from eagle_target_shm.extents import padded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from eagle_target_shm.arena import Arena, Block, Loan


class Backing(Protocol):
    """The memory itself: a `Segment`, or one on a device."""

    device: torch.device
    size: int

    def tensor(
        self, offset: int, shape: Sequence[int], dtype: torch.dtype, released: Callable[..., None], *arguments: object
    ) -> torch.Tensor:
        """A tensor at an offset; `released(*arguments)` is called when nothing refers to its memory any more."""
        ...

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where a contiguous tensor begins; None if it lies elsewhere."""
        ...

    def write_probe(self, probe: bytes) -> None:
        """Write what shows a peer that it mapped this very memory."""
        ...


class SharedMemory:
    """A segment and who uses which of its bytes.

    backing: the bytes. arena: their use. option: the option that bounds it, for messages.
    """

    def __init__(self, backing: Backing, arena: Arena, option: str) -> None:
        self.backing = backing
        self.arena = arena
        self.option = option

    def make(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """An uninitialised tensor; None where there is no room, or nothing to have room for. Never waits."""
        size = torch.Size(shape).numel() * dtype.itemsize
        block = self.arena.take(size) if size else None
        if block is None:
            return None
        return self.backing.tensor(block.offset, shape, dtype, self.arena.give_back, block)

    def find(self, tensor: torch.Tensor) -> tuple[int, Block] | None:
        """Offset and block of a tensor that lies here."""
        offset = self.backing.offset_of(tensor)
        block = None if offset is None else self.arena.find(offset, tensor.nbytes)
        return None if offset is None or block is None else (offset, block)

    def lend(self, tensors: Mapping[str, torch.Tensor], timeout: float) -> tuple[Loan, dict[str, int]] | None:
        """Lend tensors that are not empty, copied here unless they lie here: the loan, and each tensor's offset.

        Returns None when there was no room in time.

        Raises:
            RequestTooLarge: there never will be. ConnectError: the channel was closed.
        """
        found = {name: self.find(tensor) for name, tensor in tensors.items()}
        offsets = {name: place[0] for name, place in found.items() if place is not None}
        held = {id(place[1]): place[1] for place in found.values() if place is not None}
        missing = [name for name, place in found.items() if place is None]
        self._check_size(tensors, missing)
        loan = self.arena.lend(list(held.values()), [tensors[name].nbytes for name in missing], timeout)
        if loan is None:
            return None
        try:
            for name, block in zip(missing, loan.new, strict=True):
                tensor = tensors[name]
                self.backing.tensor(block.offset, tensor.shape, tensor.dtype, _nothing).copy_(tensor)
                offsets[name] = block.offset
            if isinstance(self.backing, DeviceSegment):
                self.backing.used_on.add(torch.cuda.current_stream(self.backing.device))
                # The copies are only queued: what they read must not be used again before the client has them.
                loan.keep.append([tensors[name] for name in missing])
        except BaseException:
            self.arena.release(loan.number)
            raise
        return loan, offsets

    def _check_size(self, tensors: Mapping[str, torch.Tensor], missing: Sequence[str]) -> None:
        whole = sum(padded(tensor.nbytes) for tensor in tensors.values())
        if missing and whole > self.arena.capacity:
            raise ProblemType.ANSWER_TOO_LARGE.error(
                f"the answer takes {whole} bytes of shared memory, a channel has {self.arena.capacity}: use a smaller "
                f"batch, raise option {self.option} of transport 'shm' on the server, or use transport 'wire'"
            )


class SharedTensors(PackedTensors):
    """A request's answer, made in shared memory as far as there is room, in the process's own where not.

    streams: those of the device on which it was written.
    """

    def __init__(self, memory: SharedMemory) -> None:
        super().__init__()
        self._memory = memory
        self.streams: set[torch.cuda.Stream] = set()

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return a new packed store."""
        tensor = self._make(shape, dtype)
        if tensor is None:
            return super().allocate(name, shape, dtype)
        self[name] = tensor
        return RowStore(tensor)

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Keep the tensor itself where it lies in shared memory, or nothing can be copied there yet; else a copy."""
        copy = None
        if rows.device == self._memory.backing.device and self._memory.find(rows) is None:
            copy = self._make(rows.shape, rows.dtype)
        if copy is not None:
            copy.copy_(rows)
        self[name] = rows if copy is None else copy

    def step_out(self) -> None:
        """Give shared memory back, so that no answer that waits for room holds the room another waits for."""
        device = self._memory.backing.device
        copies = {name: tensor.clone() for name, tensor in self.items() if self._memory.find(tensor) is not None}
        if device.type == "cuda" and copies:
            # Others have the room as soon as it is given back, on whatever stream they write to it.
            torch.cuda.current_stream(device).record_event().synchronize()
        self.update(copies)

    def _make(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        backing = self._memory.backing
        if isinstance(backing, DeviceSegment):
            stream = torch.cuda.current_stream(backing.device)
            self.streams.add(stream)
            backing.used_on.add(stream)
        return self._memory.make(shape, dtype)


def _nothing() -> None:
    """The loan ends by itself."""
