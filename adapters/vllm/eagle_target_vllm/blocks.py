"""Blocks of shared memory that are used again: their pages are there, and the engine's processes have them open."""

from __future__ import annotations

import logging
import queue
import weakref
from itertools import count
from typing import TYPE_CHECKING

from eagle_target.memory import IdleBlocks, Registration
from eagle_target_vllm.memory import ALIGNMENT, EngineBlock

if TYPE_CHECKING:
    import torch

    from eagle_target_vllm.memory import Address, Slot

logger = logging.getLogger(__name__)

# Blocks that lie ready; one is used for an answer of down to a quarter of its size.
KEPT_BLOCKS = 4
SPARE = 3
# Serial of a block that is opened for one call and not kept.
UNKEPT = 0


class Lease:
    """A block for as long as the lease or a tensor of it is there."""

    def __init__(self, block: EngineBlock, serial: int, view: memoryview) -> None:
        self.address: Address = (*block.address[:3], serial)
        self._view = view

    def tensor(self, slot: Slot) -> torch.Tensor:
        """The tensor of a slot, in the block's memory, which it keeps from being used again."""
        return slot.tensor(self._view)


class BlockPool:
    """The blocks of one runner; one thread leases, any thread may let go."""

    def __init__(self) -> None:
        self._serials = count(UNKEPT + 1)
        # A put from a finalizer may come in the middle of anything, in any thread.
        self._returned: queue.SimpleQueue[tuple[int, EngineBlock]] = queue.SimpleQueue()
        self._idle = IdleBlocks[tuple[int, EngineBlock]](spare=SPARE, max_blocks=KEPT_BLOCKS)
        self._dropped: list[int] = []

    def lease(self, size: int) -> Lease:
        """A block of at least `size` bytes, of whatever values.

        Raises:
            OSError: there is no memory for it.
        """
        self._collect()
        size = max(size, ALIGNMENT)
        serial, block = self._idle.take(size) or (next(self._serials), EngineBlock.create(_rounded(size)))
        view = memoryview(block.map)
        weakref.finalize(view, self._returned.put, (serial, block)).atexit = False
        return Lease(block, serial, view)

    def take_dropped(self) -> list[int]:
        """Serials of the blocks that are no longer used, each once: whoever keeps them open may close them."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _collect(self) -> None:
        while not self._returned.empty():
            serial, block = self._returned.get()
            for dropped, gone in self._idle.put(block.size, (serial, block)):
                gone.release()
                self._dropped.append(dropped)


class OpenBlocks:
    """Blocks of other processes that a worker keeps open; on a GPU they are pinned, so that copies to them overlap.

    device: the worker's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pins = device.type == "cuda"
        self._has_failed = False
        self._open: dict[int, tuple[EngineBlock, Registration | None]] = {}

    def open(self, address: Address) -> tuple[EngineBlock, bool]:
        """The block of an address, and whether it is pinned."""
        serial = address[3]
        if serial == UNKEPT:
            return EngineBlock.open_address(address), False
        if serial not in self._open:
            block = EngineBlock.open_address(address)
            self._open[serial] = block, self._pin(block) if self._pins else None
        block, registration = self._open[serial]
        return block, registration is not None

    def forget(self, serials: list[int]) -> None:
        """Close blocks; those that were never open are passed over."""
        for serial in serials:
            _, registration = self._open.pop(serial, (None, None))
            if registration is not None:
                registration.release()

    def _pin(self, block: EngineBlock) -> Registration | None:
        """Register a block with CUDA; None, and one warning, where CUDA will not."""
        try:
            return Registration(self._device, block.map)
        except OSError as error:
            if not self._has_failed:
                logger.warning("CUDA does not pin %d bytes, so copies to the host are slower: %s", block.size, error)
            self._has_failed = True
            return None


def _rounded(size: int) -> int:
    """Up to the next eighth of a power of two, so that answers of about the same size share a block."""
    step = max(ALIGNMENT, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
