"""Clients of transport `shm` in a process that a test kills, and requests whose answers are large."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import torch
from eagle_target_shm.transport import ShmTransport

from eagle_target.compute.supervise import compute_supervision
from eagle_target.contract.request import SupervisionRequest
from eagle_target.contract.sinks import PackedTensors
from eagle_target.testing.tiny import EmbeddingRunner
from eagle_target.testing.transport_harness import ServerClient
from tests.faults.processes import CONTEXT, LARGE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

SECONDS = 30.0


def large_request(seed: int = 0) -> SupervisionRequest:
    """Answered with about 20 MB."""
    return SupervisionRequest(
        input_ids=torch.randint(0, 20_000, (256,), generator=torch.Generator().manual_seed(seed)),
        seq_lens=(256,),
        row_mask=torch.ones(256, dtype=torch.bool),
        encoding="logits",
    )


def expected_answer(seed: int = 0) -> PackedTensors:
    with torch.no_grad():
        runner = EmbeddingRunner(**LARGE)
        request = large_request(seed)
        tensors = PackedTensors()
        compute_supervision(runner, request, tensors)
        return tensors


def connect(url: str, timeout: float = SECONDS) -> ServerClient:
    return ServerClient(url, ShmTransport, {}, timeout=timeout)


def fetch(client: ServerClient, seed: int = 0) -> PackedTensors:
    received = PackedTensors()
    body = client.ask(large_request(seed))
    try:
        client.receive(body, received)
    finally:
        body.close()
    return received


class StuckSink(PackedTensors):
    """Never done with its first tensor."""

    def __init__(self, reached: Connection) -> None:
        super().__init__()
        self._reached = reached

    def put(self, name: str, rows: torch.Tensor) -> None:
        self._reached.send(float(rows.sum()))
        time.sleep(1000)


def live_until_killed(url: str, reached: Connection) -> None:
    """One client that has asked for nothing, one that holds an answer, one with an answer unread, one that reads."""
    idle, holder, unread, reader = (connect(url) for _ in range(4))
    held = [fetch(holder)]
    body = unread.ask(large_request())
    reader.receive(reader.ask(large_request()), StuckSink(reached))
    del idle, held, body


@contextlib.contextmanager
def doomed_clients(url: str) -> Iterator[None]:
    """Such clients, killed at the end of the block."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=live_until_killed, args=(url, there), daemon=True)
    process.start()
    there.close()
    try:
        assert here.poll(SECONDS), "the clients did not get as far as reading"
        here.recv()
        yield
    finally:
        process.kill()
        process.join()
        process.close()
        here.close()
