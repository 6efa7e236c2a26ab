"""Batches for a device: through pinned memory, which is kept until it is copied from, and given back."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from eagle_target.client import remote as remote_module
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.compute.assembly import StagedSink
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import EmbeddingRunner
from tests.memory.cuda_runtime import CUDA, Runtime

if TYPE_CHECKING:
    from eagle_target.compute.assembly import BatchAssembler


class Assembler:
    """Copies what it is given, at some time before the device is waited for."""

    def __init__(self, *, fails: bool = False) -> None:
        self.given: dict[str, weakref.ref[torch.Tensor]] = {}
        self._fails = fails

    def put(self, name: str, rows: torch.Tensor) -> None:
        self.given[name] = weakref.ref(rows)
        if self._fails and len(self.given) == 2:
            raise ValueError("no room")

    def finish(self) -> str:
        return "the batch"


def staged(assembler: Assembler, allocate: Any = torch.empty) -> StagedSink:
    return StagedSink(cast("BatchAssembler", assembler), CUDA, lambda shape, dtype: allocate(tuple(shape), dtype=dtype))


@pytest.mark.parametrize("fails", [False, True])
def test_memory_is_there_until_the_device_has_copied_it(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    assembler = Assembler(fails=fails)
    alive: list[list[bool]] = []

    class Stream:
        def synchronize(self) -> None:
            alive.append([tensor() is not None for tensor in assembler.given.values()])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    sink = staged(assembler)
    for name in ("aux_hidden_states", "target_probs", "target_top_ids"):
        sink.allocate(name, (4, 5), torch.float32).write(0, torch.ones(4, 5))
    if fails:
        with pytest.raises(ValueError, match="no room"):
            sink.finish()
        assert alive == [[True] * 2]
        return
    assert cast("str", sink.finish()) == "the batch"
    assert alive == [[True] * 3]
    assert all(tensor() is None for tensor in assembler.given.values())


def test_a_client_of_a_device_gives_pinned_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    with loopback_server(EmbeddingRunner) as server:
        target = RemoteEagle3TargetModel.from_urls([server.url], device=CUDA, transport="wire", encoding="probs")
        sink = staged(Assembler(), target._staging.allocate)
        store = sink.allocate("aux_hidden_states", (1 << 20, 70), torch.uint8)
        assert runtime.is_pinned(store.out)
        assert runtime.registered == 70 << 20
        held = target._staging.allocate((5,), torch.float32)
        del sink, store
        target._staging.trim(remote_module.STAGING_IDLE_SECONDS)
        assert runtime.registered == 134 << 20
        target.close()
        assert runtime.is_pinned(held)
        assert runtime.registered == 64 << 20
        del held
    assert runtime.registered == 0


def test_a_batch_that_is_made_trims_what_was_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[float] = []
    with (
        loopback_server(EmbeddingRunner) as server,
        RemoteEagle3TargetModel.from_urls([server.url], transport="wire", encoding="logits") as target,
    ):
        monkeypatch.setattr(target._staging, "trim", trimmed.append)
        ids = torch.ones(1, 4, dtype=torch.int64)
        target.generate_batch(ids, ids, ids)
    assert trimmed == [remote_module.STAGING_IDLE_SECONDS]
