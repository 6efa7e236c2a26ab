"""Blocks of shared memory: used again when nobody looks, kept open by workers, pinned on a GPU."""

from __future__ import annotations

import gc
import threading
from contextlib import nullcontext

import pytest
import torch
from eagle_target_vllm.blocks import KEPT_BLOCKS, BlockPool, OpenBlocks
from eagle_target_vllm.memory import BlockSink, EngineBlock, Layout, Slot

SLOT = Slot("x", 0, (1000,), torch.int64)
SIZE = 8000


def test_a_block_is_used_again_once_its_tensors_are_gone() -> None:
    pool = BlockPool()
    first = pool.lease(SIZE)
    held, address = first.tensor(SLOT), first.address
    view = held[10:20]
    del first, held

    other = pool.lease(SIZE)
    assert other.address != address

    del view
    gc.collect()
    again = pool.lease(SIZE - 100)
    assert again.address == address
    assert pool.take_dropped() == []


def test_a_block_far_too_large_is_left_alone() -> None:
    pool = BlockPool()
    large = pool.lease(100 * SIZE).address

    assert pool.lease(SIZE).address != large
    assert pool.lease(90 * SIZE).address == large


def test_blocks_beyond_those_kept_are_dropped_and_told_once() -> None:
    pool = BlockPool()
    leases = [pool.lease(SIZE) for _ in range(KEPT_BLOCKS + 2)]
    serials = [lease.address[3] for lease in leases]
    while leases:
        del leases[0]
    pool.lease(SIZE)

    assert pool.take_dropped() == serials[:2]
    assert pool.take_dropped() == []


def test_tensors_may_be_let_go_of_by_other_threads() -> None:
    pool = BlockPool()
    addresses = set()
    for _ in range(50):
        lease = pool.lease(SIZE)
        addresses.add(lease.address)
        held = [lease.tensor(SLOT)]
        del lease
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()

    assert len(addresses) == 1


def test_a_worker_keeps_blocks_open_until_they_are_dropped() -> None:
    pool, blocks = BlockPool(), OpenBlocks(torch.device("cpu"))
    lease = pool.lease(SIZE)
    opened, is_pinned = blocks.open(lease.address)
    opened.tensor(SLOT).fill_(7)

    assert lease.tensor(SLOT).eq(7).all()
    assert not is_pinned
    assert blocks.open(lease.address)[0] is opened
    blocks.forget([lease.address[3], 99])
    assert blocks.open(lease.address)[0] is not opened


def test_a_block_of_one_call_is_not_kept() -> None:
    blocks = OpenBlocks(torch.device("cpu"))
    block = EngineBlock.create(SIZE)

    assert blocks.open(block.address)[0] is not blocks.open(block.address)[0]
    block.release()


class Runtime:
    """Stands for CUDA's where memory is registered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: dict[int, int] = {}
        self.status = 0
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if not self.status:
            self.ranges[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.ranges[address]
        return 0

    def cudaGetErrorString(self, status: int) -> str:  # noqa: N802
        return "in words"


def test_a_block_is_pinned_while_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, pool, blocks = Runtime(monkeypatch), BlockPool(), OpenBlocks(torch.device("cuda"))
    kept, forgotten = (pool.lease(SIZE) for _ in range(2))
    opened = [blocks.open(lease.address) for lease in (kept, forgotten, kept)]

    assert [is_pinned for _, is_pinned in opened] == [True, True, True]
    assert list(runtime.ranges.values()) == [opened[0][0].size] * 2
    blocks.forget([forgotten.address[3]])
    assert list(runtime.ranges) == [opened[0][0].tensor(SLOT).data_ptr()]
    del blocks
    gc.collect()
    assert runtime.ranges == {}


def test_a_block_that_cuda_does_not_pin_is_used_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, pool, blocks = Runtime(monkeypatch), BlockPool(), OpenBlocks(torch.device("cuda"))
    runtime.status = 712
    leases = [pool.lease(SIZE) for _ in range(3)]

    opened = [blocks.open(lease.address) for lease in leases]
    assert [is_pinned for _, is_pinned in opened] == [False] * 3
    opened[0][0].tensor(SLOT).fill_(7)
    assert leases[0].tensor(SLOT).eq(7).all()
    (record,) = caplog.records
    assert "in words (712): something else has registered a part of it" in record.getMessage()
    blocks.forget([lease.address[3] for lease in leases])


@pytest.mark.gpu
def test_results_go_through_pinned_memory() -> None:
    pool, blocks = BlockPool(), OpenBlocks(torch.device("cuda"))
    layout = Layout()
    slots = [layout.add("a", (3, 5), torch.bfloat16), layout.add("b", (1 << 20,), torch.int32)]
    lease = pool.lease(layout.size)
    block, is_pinned = blocks.open(lease.address)
    rows = torch.arange(1 << 20, device="cuda")

    assert is_pinned
    assert block.tensor(slots[1]).is_pinned()
    sink = BlockSink(block, slots, is_pinned=True)
    sink.put("a", torch.full((3, 5), 2.0, dtype=torch.bfloat16, device="cuda"))
    store = sink.allocate("b", (1 << 20,), torch.int32)
    for start in range(0, 1 << 20, 1 << 18):
        store.write(start, rows[start : start + (1 << 18)])
    torch.cuda.current_stream(rows.device).synchronize()

    assert lease.tensor(slots[0]).eq(2).all()
    assert torch.equal(lease.tensor(slots[1]), torch.arange(1 << 20, dtype=torch.int32))
    blocks.forget([lease.address[3]])
    assert not block.tensor(slots[1]).is_pinned()
