"""Moments of a transfer at which something is done: in this process, or in a trainer's that is killed there."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from eagle_target_nccl.groups import TcpGroup

from benchmarks.fault_sides.tally import Tally, client
from eagle_target.compute.assembly import StagedSink
from tests.faults.processes import PausedTrainer, take_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

MOMENTS = ("before", "during", "after")
PROOF_BYTES = 64


@contextlib.contextmanager
def in_a_transfer(transport: str, action: Callable[[], object]) -> Iterator[None]:
    """Do something once, in the middle of the next transfer that this process receives."""
    left = [action]

    def act() -> None:
        if left:
            left.pop()()

    read = TcpGroup._read  # noqa: SLF001 - there is no public place between two pieces
    allocate, put = StagedSink.allocate, StagedSink.put

    def read_piece(self: TcpGroup, piece: memoryview) -> int:
        # What is smaller belongs to the proofs of the two ends.
        if len(piece) > PROOF_BYTES:
            act()
        return read(self, piece)

    def allocate_tensor(self: StagedSink, *arguments: Any) -> Any:
        act()
        return allocate(self, *arguments)

    def put_tensor(self: StagedSink, *arguments: Any) -> None:
        act()
        put(self, *arguments)

    with contextlib.ExitStack() as patches:
        if transport == "nccl":
            patches.enter_context(mock.patch.object(TcpGroup, "_read", read_piece))
        else:
            patches.enter_context(mock.patch.object(StagedSink, "allocate", allocate_tensor))
            patches.enter_context(mock.patch.object(StagedSink, "put", put_tensor))
        yield


def _train(url: str, transport: str, moment: str, parent: Connection) -> None:
    torch.set_num_threads(1)
    with client(url, transport=transport, tally=Tally()) as target:
        take_batch(target, moment, parent, partial(in_a_transfer, transport))


def trainer_at(moment: str, url: str, transport: str) -> PausedTrainer:
    """A trainer that has come to a moment of its first transfer, in a process of its own."""
    return PausedTrainer(_train, url, transport, moment)
