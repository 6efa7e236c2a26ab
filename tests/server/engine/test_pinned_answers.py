"""Answers that come from CUDA: in pinned memory that is given back, and not before copies to it are over."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch

from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import AdapterError
from eagle_target.server.engine import answer
from eagle_target.server.engine.answer import Answer, HostMemory
from eagle_target.server.engine.pipeline import DeviceOrder
from eagle_target.testing.tiny import EmbeddingRunner
from tests.memory.cuda_runtime import CUDA, Runtime
from tests.server.cases import ENGINE_THREAD, engine, request_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.sinks import Sink

ROWS = 3 << 18


def answer_of(memory: HostMemory) -> Answer:
    return Answer(request_of([ROWS]), PackedTensors(), memory)


def test_answers_lie_in_pinned_memory_that_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime, memory = Runtime(monkeypatch), HostMemory(CUDA)
    first, second = answer_of(memory), answer_of(memory)
    stores = [answer.allocate("aux_hidden_states", (ROWS, 48), torch.bfloat16) for answer in (first, second)]
    assert all(store.non_blocking and runtime.is_pinned(store.out) for store in stores)
    # 72 MiB each.
    assert runtime.registered == 144 << 20
    del first, stores
    memory.trim()
    assert runtime.registered == 144 << 20
    monkeypatch.setattr(answer, "IDLE_SECONDS", 0.0)
    memory.trim()
    assert runtime.registered == 72 << 20
    memory.close()
    assert runtime.is_pinned(second.tensors["aux_hidden_states"])
    del second
    assert runtime.registered == 0


def test_answers_of_a_cpu_are_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, memory = Runtime(monkeypatch), HostMemory(torch.device("cpu"))
    store = answer_of(memory).allocate("aux_hidden_states", (ROWS, 48), torch.bfloat16)
    assert not store.non_blocking
    assert runtime.registrations == 0


class Stream:
    """Says when it is waited for."""

    def __init__(self, log: list[str], error: Exception | None = None) -> None:
        self._log = log
        self._error = error

    def synchronize(self) -> None:
        self._log.append("waited")
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize("error", [None, RuntimeError("an illegal address")])
def test_a_projection_that_fails_leaves_no_copy_under_way(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    log: list[str] = []
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda what: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(log, error))
    order = DeviceOrder(CUDA, is_beside=False)
    with pytest.raises(ValueError, match="a bad row"), order.following(None, None):
        raise ValueError("a bad row")
    assert log == ["waited"]


class FailsHalfWay(EmbeddingRunner):
    """Writes a part of an answer, and fails."""

    def supervise(self, requests: Sequence[SupervisionRequest], sinks: Sequence[Sink]) -> dict[str, float]:
        store = sinks[0].allocate("aux_hidden_states", (requests[0].tokens, 48), torch.float32)
        store.write(0, torch.ones(1, 48))
        raise AdapterError("the engine fails half-way")


def test_a_runner_that_fails_half_way_leaves_no_copy_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    monkeypatch.setattr(DeviceOrder, "settle", lambda order: threads.append(threading.current_thread().name))
    with engine(FailsHalfWay) as server, pytest.raises(AdapterError, match="half-way"):
        server.submit(request_of([4])).result(30)
    assert threads == [ENGINE_THREAD]
