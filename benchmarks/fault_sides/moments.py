"""Moments of a transfer at which something is done: in this process, or in a trainer's that is killed there."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from eagle_target_nccl.groups import PairGroup

from benchmarks.fault_sides.tally import SOON_SECONDS, Tally, client
from eagle_target.client.staging import StagedSink
from eagle_target.errors import BenchmarkError
from tests.faults.processes import CONTEXT

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

# Logits of 128 tokens, of which a server with a vocabulary of 20 000 makes 10 MB.
ROWS = {name: torch.ones(4, 32, dtype=torch.int64) for name in ("input_ids", "attention_mask", "loss_mask")}
MOMENTS = ("before", "during", "after")


@contextlib.contextmanager
def in_a_transfer(transport: str, action: Callable[[], object]) -> Iterator[None]:
    """Do something once, in the middle of the next transfer that this process receives."""
    left = [action]

    def act() -> None:
        if left:
            left.pop()()

    receive = PairGroup._receive  # noqa: SLF001 - there is no public place between two messages
    allocate, put = StagedSink.allocate, StagedSink.put

    def receive_message(self: PairGroup, message: torch.Tensor, number: int, kind: int) -> Any:
        if number:
            act()
        return receive(self, message, number, kind)

    def allocate_tensor(self: StagedSink, *arguments: Any) -> Any:
        act()
        return allocate(self, *arguments)

    def put_tensor(self: StagedSink, *arguments: Any) -> None:
        act()
        put(self, *arguments)

    with contextlib.ExitStack() as patches:
        if transport == "nccl":
            patches.enter_context(mock.patch.object(PairGroup, "_receive", receive_message))
        else:
            patches.enter_context(mock.patch.object(StagedSink, "allocate", allocate_tensor))
            patches.enter_context(mock.patch.object(StagedSink, "put", put_tensor))
        yield


def _train(url: str, transport: str, moment: str, parent: Connection) -> None:
    def pause() -> None:
        parent.send("here")
        parent.recv()

    torch.set_num_threads(1)
    with client(url, transport=transport, tally=Tally()) as target:
        if moment == "before":
            pause()
        with in_a_transfer(transport, pause if moment == "during" else lambda: None):
            batch = target.generate_batch(**ROWS)
        if moment == "after":
            pause()
        if batch.logits is not None:
            parent.send(float(batch.logits.double().sum()))


class Trainer:
    """A trainer in a process of its own that has come to a moment of its first transfer, and waits there."""

    def __init__(self, url: str, transport: str, moment: str) -> None:
        self._pipe, child = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_train, args=(url, transport, moment, child), daemon=True)
        self._process.start()
        child.close()
        self.hear()

    def hear(self) -> Any:
        """What it says next."""
        if not self._pipe.poll(SOON_SECONDS):
            raise BenchmarkError("nothing was heard of a trainer's process")
        return self._pipe.recv()

    def go_on(self) -> None:
        """Past the moment."""
        self._pipe.send("go on")

    def signal(self, number: signal.Signals) -> None:
        """As `kill` does."""
        os.kill(int(self._process.pid or 0), number)

    def end(self) -> None:
        """Wait for its end."""
        self._process.join(SOON_SECONDS)
        self._process.close()
        self._pipe.close()
