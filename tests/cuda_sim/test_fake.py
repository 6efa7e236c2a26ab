"""The fake itself: right programs pass in every order, and each textbook mistake is seen in at least one."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.cuda_sim.device import DeviceFault, Spin, Stuck
from tests.cuda_sim.patches import fake_cuda

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cuda_sim.device import Machine
    from tests.cuda_sim.tensors import World

SEEDS = range(20)
SIZE = 64


def wrong_in(program: Callable[[Machine], bool], seeds: range = SEEDS) -> list[int]:
    """The seeds in which a program does not see what it should."""
    wrong = []
    for seed in seeds:
        with fake_cuda(seed) as world:
            if not program(world.machine):
                wrong.append(seed)
    return wrong


def filled(value: float, device: str = "cuda:0") -> torch.Tensor:
    return torch.full((SIZE,), float(value), device=device)


# Values.


def test_tensors_are_where_they_were_made_and_hold_what_was_computed(world: World) -> None:
    rows = torch.ones(3, 2, device="cuda:1")
    assert rows.is_cuda
    assert rows.device == torch.device("cuda:1")
    rows[0] = 5
    rows[1:2].copy_(torch.zeros(1, 2))
    assert rows.tolist() == [[5, 5], [0, 0], [1, 1]]
    assert rows[torch.tensor([0, 2])].tolist() == [[5, 5], [1, 1]]
    assert rows[rows > 4].tolist() == [5, 5]
    assert torch.cat([rows, rows]).shape == (6, 2)
    assert rows.view(torch.uint8).shape == (3, 8)
    assert rows.T.contiguous().tolist() == [[5, 0, 1], [5, 0, 1]]
    assert rows.double().argmax(-1).tolist() == [0, 0, 0]
    assert torch.nn.functional.linear(rows, torch.eye(2).to("cuda:1")).tolist() == rows.tolist()
    out = torch.empty(3, 2, device="cuda:1")
    assert torch.softmax(rows, -1, dtype=torch.float32, out=out) is out
    assert torch.equal(out.cpu(), torch.softmax(rows.cpu(), -1))
    ids = torch.zeros(3, dtype=torch.int64, device="cuda:1")
    ids.index_copy_(0, torch.tensor([2]).to("cuda:1"), torch.tensor([7]).to("cuda:1"))
    assert int(ids.max()) == 7
    assert torch.unique(ids).tolist() == [0, 7]
    assert torch.zeros_like(rows).tolist() == [[0, 0]] * 3
    assert torch.empty(0, 4, device="cuda:1").tolist() == []


def test_inference_mode_works(world: World) -> None:
    outside = torch.ones(2, 2, device="cuda:0")
    with torch.inference_mode():
        assert (outside.t() @ outside).reshape(-1).tolist() == [2, 2, 2, 2]
        assert torch.ones(2, device="cuda:0").mul_(3).tolist() == [3, 3]


def test_tensors_of_two_devices_do_not_mix(world: World) -> None:
    here = torch.ones(2, device="cuda:0")
    for other in (torch.ones(2), torch.ones(2, device="cuda:1")):
        with pytest.raises(RuntimeError, match="same device"):
            _ = here + other
    assert (here + torch.tensor(2.0)).tolist() == [3, 3]
    assert here.to("cuda:1").tolist() == [1, 1]


def test_fresh_memory_holds_nothing_of_use(world: World) -> None:
    assert torch.empty(SIZE, device="cuda:0").isnan().all().item()
    assert torch.empty(SIZE, pin_memory=True).isnan().all().item()


def test_what_the_host_has_waited_for_is_written_after_the_last_use_of_its_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.tensor([True, False, True]).to("cuda:0")
    held = [torch.zeros(2, 1, dtype=torch.int64, device="cuda:0")]
    wait = world.machine.wait

    def wait_and_let_go(*arguments: Any) -> None:
        wait(*arguments)
        held.clear()  # as another thread may, just then

    monkeypatch.setattr(world.machine, "wait", wait_and_let_go)
    rows = mask.nonzero()
    monkeypatch.undo()

    torch.cuda.current_stream("cuda:0").synchronize()
    assert rows.tolist() == [[0], [2]]


def test_work_that_fails_is_told_to_who_waits(machine: Machine) -> None:
    torch.zeros(4, device="cuda:0").index_copy_(0, torch.tensor([9]).to("cuda:0"), torch.ones(1, device="cuda:0"))
    with pytest.raises(DeviceFault, match="index"):
        torch.cuda.current_stream("cuda:0").synchronize()


# Streams and events.


def test_what_waits_for_an_event_sees_what_was_before_it(world: World) -> None:
    side = torch.cuda.Stream("cuda:0")  # type: ignore[no-untyped-call]
    source = filled(1)
    source += 1
    mark = torch.cuda.current_stream("cuda:0").record_event()
    with torch.cuda.stream(side):
        side.wait_event(mark)
        copy = source.clone()
    side.synchronize()
    assert copy.inner.tolist() == [2.0] * SIZE  # type: ignore[attr-defined]


def test_a_missing_wait_is_seen() -> None:
    def forgets(machine: Machine) -> bool:
        side = torch.cuda.Stream("cuda:0")  # type: ignore[no-untyped-call]
        source = filled(1)
        with torch.cuda.stream(side):
            copy = source.clone()
        side.synchronize()
        return copy.cpu().tolist() == [1.0] * SIZE

    assert {0, 2} & {*wrong_in(forgets)}


def test_memory_let_go_of_before_a_copy_on_another_stream_is_seen() -> None:
    def lets_go(machine: Machine, *, keeps: bool = False, records: bool = False) -> bool:
        side = torch.cuda.Stream("cuda:0")  # type: ignore[no-untyped-call]
        source = filled(1)
        mark = torch.cuda.current_stream("cuda:0").record_event()
        with torch.cuda.stream(side):
            side.wait_event(mark)
            copy = source.clone()
            if records:
                source.record_stream(side)
        kept = source if keeps else None
        del source
        # The block is the first choice of the next tensor of this size.
        filled(2)
        side.synchronize()
        del kept
        with torch.cuda.stream(side):
            return copy.cpu().tolist() == [1.0] * SIZE

    assert 1 in wrong_in(lets_go)
    assert wrong_in(lambda machine: lets_go(machine, keeps=True)) == []
    assert wrong_in(lambda machine: lets_go(machine, records=True)) == []


def test_memory_let_go_of_on_its_own_stream_is_safe(world: World) -> None:
    source = filled(1)
    copy = source.clone()
    del source
    filled(2)
    assert copy.tolist() == [1.0] * SIZE


def test_a_block_is_given_out_again_on_its_stream_and_no_other(world: World) -> None:
    first = filled(1)
    address = first.data_ptr()
    first.cpu()
    del first
    with torch.cuda.stream(torch.cuda.Stream("cuda:0")):  # type: ignore[no-untyped-call]
        assert filled(2).data_ptr() != address
    assert filled(3).data_ptr() == address


def test_a_view_keeps_the_memory(world: World) -> None:
    whole = torch.arange(8, device="cuda:0")
    part = whole[4:]
    del whole
    filled(2)
    assert part.tolist() == [4, 5, 6, 7]


# The host.


def test_pinned_memory_is_read_too_early_without_a_wait() -> None:
    def hurries(machine: Machine, *, waits: bool = False) -> bool:
        source = filled(1)
        pinned = torch.empty(SIZE, pin_memory=True)
        pinned.copy_(source, non_blocking=True)
        if waits:
            torch.cuda.current_stream("cuda:0").record_event().synchronize()
        return pinned.tolist() == [1.0] * SIZE

    assert {0, 1, 2} <= {*wrong_in(hurries)}
    assert wrong_in(lambda machine: hurries(machine, waits=True)) == []


def test_pinned_memory_that_is_written_again_too_early_is_seen() -> None:
    def hurries(machine: Machine) -> bool:
        pinned = torch.ones(SIZE).pin_memory()
        copy = torch.empty(SIZE, device="cuda:0")
        copy.copy_(pinned, non_blocking=True)
        pinned.fill_(2)
        return copy.tolist() == [1.0] * SIZE

    assert {0, 1, 2} <= {*wrong_in(hurries)}


def test_pageable_memory_is_copied_at_once(machine: Machine) -> None:
    pageable = torch.ones(SIZE)
    copy = pageable.to("cuda:0", non_blocking=True)
    pageable.fill_(2)
    assert [sync.kind for sync in machine.syncs] == ["staged"]
    back = torch.empty(SIZE)
    back.copy_(copy, non_blocking=True)
    assert back.tolist() == [1.0] * SIZE
    assert [sync.kind for sync in machine.syncs] == ["staged", "copy"]


def test_pinned_is_what_was_pinned(world: World) -> None:
    pinned = torch.empty(SIZE, pin_memory=True)
    assert pinned.is_pinned()
    assert pinned[3:].is_pinned()
    assert torch.ones(4).pin_memory().is_pinned()
    assert not torch.ones(4).is_pinned()
    assert filled(1).to("cpu", non_blocking=True).is_pinned()
    memory = torch.ones(SIZE)
    assert torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0) == 0  # type: ignore[no-untyped-call]
    assert memory.is_pinned()
    assert torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()) == 0  # type: ignore[no-untyped-call]
    assert not memory.is_pinned()


def test_waits_of_the_host_are_counted_by_thread_and_place(machine: Machine) -> None:
    rows = filled(1)
    assert machine.syncs == []

    def look() -> None:
        assert bool((rows == 1).all())
        _ = rows.cpu()
        torch.cuda.synchronize()

    thread = threading.Thread(target=look, name="looker")
    thread.start()
    thread.join()
    assert [(sync.kind, sync.thread) for sync in machine.syncs] == [
        ("value", "looker"),
        ("copy", "looker"),
        ("device", "looker"),
    ]
    assert all("test_fake.py" in sync.site or "threading.py" in sync.site for sync in machine.syncs)


# Threads and processes.


def test_a_thread_begins_on_device_0_and_the_default_stream(world: World) -> None:
    torch.cuda.set_device(2)
    side = torch.cuda.Stream("cuda:2")  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side), ThreadPoolExecutor(1) as threads:
        assert torch.empty(1, device="cuda").device.index == 2
        assert torch.cuda.current_stream() == side
        assert threads.submit(lambda: torch.empty(1, device="cuda").device.index).result() == 0
        assert threads.submit(torch.cuda.current_stream, "cuda:2").result() == torch.cuda.default_stream("cuda:2")
    assert torch.cuda.current_stream() == torch.cuda.default_stream("cuda:2")


def test_a_stream_brings_its_device(world: World) -> None:
    with torch.cuda.stream(torch.cuda.Stream("cuda:3")):  # type: ignore[no-untyped-call]
        assert torch.cuda.current_device() == 3
    with torch.cuda.device("cuda:1"):
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0


def test_a_process_has_default_streams_and_contexts_of_its_own(machine: Machine) -> None:
    ours = torch.cuda.default_stream("cuda:0")
    with machine.in_process("another"):
        assert torch.cuda.default_stream("cuda:0") != ours
        torch.empty(1, device="cuda:3")
    assert machine.contexts == {("main", 0), ("another", 0), ("another", 3)}


def test_an_event_reaches_another_process_by_its_handle(machine: Machine) -> None:
    rows = filled(1)
    event = torch.cuda.Event(interprocess=True)  # type: ignore[no-untyped-call]
    event.record()
    handle = event.ipc_handle()  # type: ignore[no-untyped-call]
    with machine.in_process("another"):
        torch.cuda.current_stream("cuda:0").wait_event(torch.cuda.Event.from_ipc_handle("cuda:0", handle))  # type: ignore[no-untyped-call]
        assert rows.clone().tolist() == [1.0] * SIZE


# What does not end.


def test_who_waits_for_a_closed_gate_is_told(machine: Machine) -> None:
    gate = machine.hold(machine.default_queue(0), "a long kernel")
    with pytest.raises(Stuck, match="a long kernel"):
        filled(1).tolist()
    side = torch.cuda.Stream("cuda:0")  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        assert filled(1).tolist() == [1.0] * SIZE
    machine.open(gate)
    assert filled(1).tolist() == [1.0] * SIZE


def test_a_whole_device_is_never_waited_for_beside_a_spinning_kernel(machine: Machine) -> None:
    met: list[int] = []
    spinning = torch.cuda.Stream("cuda:0")  # type: ignore[no-untyped-call]
    machine.launch(spinning.queue, "a send", gate=Spin("a send", lambda: bool(met)))  # type: ignore[attr-defined]
    assert filled(1).tolist() == [1.0] * SIZE
    with pytest.raises(Stuck, match="a send"):
        torch.cuda.synchronize("cuda:0")
    with pytest.raises(Stuck, match="a send"):
        torch.cuda.synchronize()
    met.append(1)
    torch.cuda.synchronize("cuda:0")


def test_nothing_is_left_of_it_afterwards() -> None:
    available = torch.cuda.is_available()
    with fake_cuda(0) as world:
        rows = torch.ones(3, device="cuda:0")
        assert world.memory.allocated[0] > 0
        del rows
        gc.collect()
        world.machine.drain()
        assert world.memory.allocated[0] == 0
    assert torch.cuda.is_available() == available
    assert torch.ones(2).tolist() == [1, 1]
