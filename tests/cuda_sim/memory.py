"""Memory of devices and pinned memory, given out as torch's allocators do, and poisoned when it is let go of."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tests.cuda_sim.device import Machine, Point, Queue

# NaN in every floating dtype, -1 in every signed integer.
POISON = 0xFF
ROUNDING = 512
DEVICE_BYTES = 80 << 30


@dataclass(slots=True, eq=False)
class Block:
    """Memory of a device. queue: the stream it was allocated on. used_on: the streams it was recorded on.

    is_foreign: whether it is not the caching allocator's, which then neither poisons it nor records streams for it.
    """

    memory: torch.Tensor
    device: int
    queue: Queue
    size: int
    is_foreign: bool = False
    used_on: set[Queue] = field(default_factory=set)


class Holder:
    """What all tensors of one block share: the block goes back when nothing refers to it any more."""

    def __init__(self, block: Block, owner: object = None) -> None:
        self.block = block
        self.owner = owner


class DeviceMemory:
    """torch's caching allocator for all devices, and cudaMalloc beside it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        # A finalizer may come in the middle of anything: what it brings is looked at by the next call.
        self._returned: deque[Block] = deque()
        self._free: dict[tuple[Queue, int], list[Block]] = {}
        self._in_use_elsewhere: list[tuple[Block, list[Point]]] = []
        self._raw: dict[int, Block] = {}
        self.allocated = [0] * machine.devices
        self.peak = [0] * machine.devices
        self.reserved = [0] * machine.devices
        machine.before_wait = self.collect

    def allocate(self, device: int, size: int) -> Holder:
        """Memory for a tensor, on the calling thread's stream; what was let go of last on it is given out first."""
        queue = self._machine.current_queue(device)
        rounded = -(-max(size, 1) // ROUNDING) * ROUNDING
        with self._machine.lock:
            self.collect()
            free = self._free.get((queue, rounded))
            if free:
                block = free.pop()
                block.used_on.clear()
                block.size = size
            else:
                block = Block(poisoned(rounded), device, queue, size)
                self.reserved[device] += rounded
            self.allocated[device] += rounded
            self.peak[device] = max(self.peak[device], self.allocated[device])
        holder = Holder(block)
        weakref.finalize(holder, self._returned.append, block).atexit = False
        return holder

    def collect(self) -> None:
        """Take back what was let go of, and what no recorded stream uses any more."""
        with self._machine.lock:
            while self._returned:
                block = self._returned.popleft()
                points = [queue.end for queue in block.used_on if queue is not block.queue]
                self._in_use_elsewhere.append((block, points))
            waiting, self._in_use_elsewhere = self._in_use_elsewhere, []
            for block, points in waiting:
                if all(point.reached for point in points):
                    self._release(block)
                else:
                    self._in_use_elsewhere.append((block, points))

    def _release(self, block: Block) -> None:
        # The next tensor on this stream may have the block at once: in its order, and in no other's.
        self._machine.launch(block.queue, "memory that was let go of", lambda: _poison(block.memory))
        self._free.setdefault((block.queue, len(block.memory)), []).append(block)
        self.allocated[block.device] -= len(block.memory)

    def allocate_raw(self, device: int, size: int) -> int:
        """cudaMalloc: the address."""
        block = Block(poisoned(size), device, self._machine.current_queue(device), size, is_foreign=True)
        self._raw[block.memory.data_ptr()] = block
        return block.memory.data_ptr()

    def free_raw(self, address: int) -> None:
        """cudaFree: waits for all of the device."""
        block = self._raw.pop(address)
        self._machine.wait_for_device(block.device)
        _poison(block.memory)

    def find_raw(self, address: int) -> tuple[Block, int]:
        """The block of an address, and the offset in it."""
        for start, block in self._raw.items():
            if start <= address < start + len(block.memory):
                return block, address - start
        raise RuntimeError(f"CUDA error: {address:#x} is no device memory")


class PinnedMemory:
    """Which CPU tensors are pinned. registered: addresses that cudaHostRegister pinned."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}
        self.registered: set[int] = set()

    def make(self, tensor: torch.Tensor) -> torch.Tensor:
        """Have a new tensor be pinned, poisoned as new memory is."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            _poison(torch.empty(0, dtype=torch.uint8).set_(storage))
            self._storages[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, self._storages.pop, storage.data_ptr(), None).atexit = False
        return tensor

    def register(self, address: int, size: int) -> None:
        """CudaHostRegister."""
        self._storages[address] = size
        self.registered.add(address)

    def unregister(self, address: int) -> bool:
        """cudaHostUnregister; whether it was registered."""
        self.registered.discard(address)
        return self._storages.pop(address, None) is not None

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a CPU tensor lies in pinned memory."""
        address = tensor.data_ptr()
        return any(start <= address < start + size for start, size in list(self._storages.items()))


def poisoned(size: int) -> torch.Tensor:
    """Fresh bytes: whatever was there before, which is never what is wanted."""
    return torch.full((size,), POISON, dtype=torch.uint8)


def _poison(memory: torch.Tensor) -> None:
    memory.fill_(POISON)
