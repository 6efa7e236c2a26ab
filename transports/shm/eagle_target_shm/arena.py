"""Room in one segment: blocks that tensors lie in, and loans of them to the client."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from eagle_target.errors import ConnectError
from eagle_target.memory import Extents
from eagle_target_shm.extents import padded, place

if TYPE_CHECKING:
    from collections.abc import Sequence

# Each has a slot of its own and may have an acknowledgement in the socket, which holds twice as many.
MAX_LOANS = 128
# A tensor may die while this very thread holds the lock; what it returns is then seen this much later.
POLL_SECONDS = 0.05


class Locks(Protocol):
    """The part of `Segment` that settles who has a loan."""

    def lock(self, number: int) -> bool:
        """Take a lock; whether it was to be had."""
        ...


@dataclass(slots=True, eq=False)
class Block:
    """Bytes in use. holders: this process's tensor and loans, each counts one."""

    offset: int
    size: int
    holders: int = 1


@dataclass(slots=True, eq=False)
class Loan:
    """Blocks that the client may read.

    number: no other loan of the segment ever has it; its remainder by MAX_LOANS is its slot.
    new: the blocks made for it, in the order of the sizes asked for. lent_at: `time.monotonic()` of its ticket.
    taken: the client is known to have it. keep: what must live as long.
    """

    number: int
    blocks: list[Block]
    new: list[Block]
    lent_at: float = math.inf
    taken: bool = False
    keep: list[Any] = field(default_factory=list)


class Arena:
    """Blocks and loans of a segment's bytes. Called from any thread.

    Args:
        start, end: the bytes. locks: which loans the client took.
        take_timeout: seconds after which a loan whose ticket never reached the client is taken back.
        first_number: of the first loan, a multiple of MAX_LOANS.
    """

    def __init__(self, start: int, end: int, *, locks: Locks, take_timeout: float, first_number: int = 0) -> None:
        self.capacity = end - start
        self._locks = locks
        self._take_timeout = take_timeout
        self._free = Extents(start, end)
        self._blocks: dict[int, Block] = {}
        self._loans: dict[int, Loan] = {}
        self._slots = list(reversed(range(MAX_LOANS)))
        self._numbers = [first_number + slot for slot in range(MAX_LOANS)]
        self._returned: deque[Block] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[object] = deque()
        self._closed = False

    @property
    def loans(self) -> int:
        """Loans that are out."""
        return len(self._loans)

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks."""
        with self._changed:
            self._settle()
            return sum(block.size for block in self._blocks.values())

    def take(self, size: int) -> Block | None:
        """A block for a tensor of this process; None where there is no room, or others wait for it."""
        with self._changed:
            self._settle()
            return None if self._waiting or self._closed else self._place(size)

    def give_back(self, block: Block) -> None:
        """The tensor of a block is gone. Called by finalizers: at any point of any thread."""
        self._returned.append(block)
        if self._changed.acquire(blocking=False):
            try:
                self._settle()
                self._changed.notify_all()
            finally:
                self._changed.release()

    def find(self, offset: int, size: int) -> Block | None:
        """The block that holds these bytes."""
        with self._changed:
            return next(
                (
                    block
                    for block in self._blocks.values()
                    if block.offset <= offset and offset + size <= block.offset + block.size
                ),
                None,
            )

    def lend(self, held: Sequence[Block], sizes: Sequence[int], timeout: float) -> Loan | None:
        """A loan of `held` and of new blocks; those who wait are served in order. None when the time is over.

        Raises:
            ConnectError: the arena was closed.
        """
        turn, deadline = object(), time.monotonic() + timeout
        with self._changed:
            self._waiting.append(turn)
            try:
                while True:
                    self._settle()
                    if self._closed:
                        raise ConnectError("the channel was closed while an answer waited for room in shared memory")
                    loan = self._make(held, sizes) if self._waiting[0] is turn else None
                    left = deadline - time.monotonic()
                    if loan is not None or left <= 0:
                        return loan
                    self._changed.wait(min(left, POLL_SECONDS))
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()

    def release(self, number: int) -> None:
        """The client returned a loan; one that is not out is ignored."""
        with self._changed:
            loan = self._loans.get(number % MAX_LOANS)
            if loan is not None and loan.number == number:
                self._end(loan)
            self._settle()
            self._changed.notify_all()

    def close(self) -> None:
        """Give nothing more out; those who wait have an error. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _make(self, held: Sequence[Block], sizes: Sequence[int]) -> Loan | None:
        loan = self._try(held, sizes)
        return loan if loan is not None or not self._take_back() else self._try(held, sizes)

    def _try(self, held: Sequence[Block], sizes: Sequence[int]) -> Loan | None:
        if not self._slots:
            return None
        new: list[Block] = []
        for size in sizes:
            block = self._place(size)
            if block is None:
                for placed in new:
                    self._drop(placed)
                return None
            new.append(block)
        for block in held:
            block.holders += 1
        slot = self._slots.pop()
        loan = self._loans[slot] = Loan(self._numbers[slot], [*held, *new], new)
        self._numbers[slot] += MAX_LOANS
        return loan

    def _take_back(self) -> bool:
        """Take back loans that the client never took, and now never can."""
        oldest = time.monotonic() - self._take_timeout
        lost = []
        for loan in self._loans.values():
            if not loan.taken and loan.lent_at < oldest:
                loan.taken = not self._locks.lock(loan.number)
                if not loan.taken:
                    lost.append(loan)
        for loan in lost:
            self._end(loan)
        return bool(lost)

    def _end(self, loan: Loan) -> None:
        slot = loan.number % MAX_LOANS
        del self._loans[slot]
        self._slots.append(slot)
        for block in loan.blocks:
            self._drop(block)

    def _place(self, size: int) -> Block | None:
        offset = place(self._free, padded(size))
        if offset is None:
            return None
        block = self._blocks[offset] = Block(offset, padded(size))
        return block

    def _drop(self, block: Block) -> None:
        block.holders -= 1
        if not block.holders:
            del self._blocks[block.offset]
            self._free.give_back(block.offset, block.size)

    def _settle(self) -> None:
        while self._returned:
            self._drop(self._returned.popleft())
