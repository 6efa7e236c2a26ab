"""Memory that is used again only when nothing refers to it, and not kept for ever."""

from __future__ import annotations

import gc
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from eagle_target.memory import ROUNDING_BYTES, SMALL_BYTES, BufferPool, IdleBlocks, trim_heap

if TYPE_CHECKING:
    from collections.abc import Callable

SHARERS: dict[str, Callable[[torch.Tensor], object]] = {
    "view": lambda tensor: tensor.view(-1),
    "slice": lambda tensor: tensor[3, 5:6],
    "transpose": lambda tensor: tensor.T,
    "dtype": lambda tensor: tensor.view(torch.int32),
    "detach": lambda tensor: tensor.detach(),
    "storage": lambda tensor: tensor.untyped_storage(),
    "numpy": lambda tensor: tensor.numpy(),
    "list": lambda tensor: [tensor],
}
LARGE = ROUNDING_BYTES // 4


def test_memory_is_used_again_once_its_tensor_is_gone() -> None:
    pool = BufferPool()
    first = pool.allocate((LARGE,), torch.float32)
    address = first.data_ptr()
    second = pool.allocate((LARGE,), torch.float32)
    assert second.data_ptr() != address
    assert pool.idle_bytes == 0
    del first
    assert pool.idle_bytes == ROUNDING_BYTES
    third = pool.allocate((2, LARGE // 2), torch.int32)
    assert third.data_ptr() == address
    assert pool.idle_bytes == 0


@pytest.mark.parametrize("shape", [(LARGE,), (4, LARGE // 4), (LARGE // 8, 2, 4), (LARGE - 3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pool = BufferPool()
    tensor = pool.allocate(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    tensor.fill_(1)
    assert bool((tensor == 1).all())
    assert tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (SMALL_BYTES // 4 - 1,)])
def test_small_tensors_are_torchs_own(shape: tuple[int, ...]) -> None:
    pool = BufferPool()
    tensor = pool.allocate(shape, torch.float32)
    assert tuple(tensor.shape) == shape
    del tensor
    assert pool.idle_bytes == 0


@pytest.mark.parametrize("keep", SHARERS)
def test_anything_that_shares_the_memory_keeps_it(keep: str) -> None:
    pool = BufferPool()
    tensor = pool.allocate((16, LARGE // 16), torch.float32)
    tensor.fill_(7)
    address = tensor.data_ptr()
    kept = SHARERS[keep](tensor)
    del tensor
    gc.collect()
    assert pool.idle_bytes == 0
    other = pool.allocate((LARGE,), torch.float32)
    assert other.data_ptr() != address
    other.fill_(8)
    if isinstance(kept, torch.Tensor):
        assert bool((kept.view(torch.float32) == 7).all())
    del kept
    gc.collect()
    assert pool.idle_bytes == ROUNDING_BYTES


def test_what_autograd_saved_keeps_the_memory() -> None:
    pool = BufferPool()
    tensor = pool.allocate((LARGE,), torch.float32)
    tensor.fill_(3)
    weight = torch.ones(LARGE, requires_grad=True)
    loss = (weight * tensor).sum()
    del tensor
    assert pool.idle_bytes == 0
    pool.allocate((LARGE,), torch.float32).fill_(100)
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert bool((weight.grad == 3).all())
    del loss
    gc.collect()
    assert pool.idle_bytes == 2 * ROUNDING_BYTES


def test_idle_memory_is_bounded() -> None:
    pool = BufferPool(max_idle_bytes=3 * ROUNDING_BYTES)
    tensors = [pool.allocate((LARGE,), torch.float32) for _ in range(5)]
    tensors.clear()
    assert pool.idle_bytes == 3 * ROUNDING_BYTES
    large = pool.allocate((4 * LARGE,), torch.float32)
    del large
    assert pool.idle_bytes <= 3 * ROUNDING_BYTES


def test_closing_gives_memory_back_now_and_later() -> None:
    pool = BufferPool()
    kept, gone = (pool.allocate((LARGE,), torch.float32) for _ in range(2))
    del gone
    assert pool.idle_bytes == ROUNDING_BYTES
    pool.close()
    assert pool.idle_bytes == 0
    kept.fill_(5)
    assert bool((kept == 5).all())
    del kept
    assert pool.idle_bytes == 0
    pool.close()
    after = pool.allocate((LARGE,), torch.float32)
    del after
    assert pool.idle_bytes == 0


def test_threads_never_share_memory() -> None:
    pool = BufferPool(max_idle_bytes=8 * ROUNDING_BYTES)
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait(20)
        for step in range(50):
            tensor = pool.allocate((LARGE + step % 2 * LARGE,), torch.float32)
            tensor.fill_(number)
            view = tensor[step:]
            del tensor
            assert bool((view == number).all())

    with ThreadPoolExecutor(4) as executor:
        for future in [executor.submit(work, number) for number in range(4)]:
            future.result(60)
    assert pool.idle_bytes <= 8 * ROUNDING_BYTES


def test_many_batches_take_no_more_memory_than_a_few() -> None:
    pool = BufferPool(max_idle_bytes=64 << 20)
    process = psutil.Process()

    def batches(count: int) -> int:
        for number in range(count):
            # Rows of a batch differ in number, and so do its tensors in size.
            tensors = [pool.allocate((LARGE + number % 5 * LARGE // 2,), torch.float32) for _ in range(3)]
            for tensor in tensors:
                tensor.zero_()
        del tensors, tensor
        return int(process.memory_info().rss)

    early = batches(20)
    assert batches(200) - early < 32 << 20
    idle = pool.idle_bytes
    assert idle <= 64 << 20
    pool.close()


def test_the_size_not_used_for_longest_goes_first() -> None:
    pool = BufferPool(max_idle_bytes=4 * ROUNDING_BYTES)
    small, large = pool.allocate((LARGE,), torch.float32), pool.allocate((3 * LARGE,), torch.float32)
    address = large.data_ptr()
    del small, large
    assert pool.idle_bytes == 4 * ROUNDING_BYTES
    medium = pool.allocate((2 * LARGE,), torch.float32)
    del medium
    # The small block, and then the large one, made room for it.
    assert pool.idle_bytes == 2 * ROUNDING_BYTES
    again = pool.allocate((3 * LARGE,), torch.float32)
    again.fill_(address)
    assert pool.idle_bytes == 2 * ROUNDING_BYTES


def test_a_block_that_is_a_little_larger_will_do() -> None:
    pool = BufferPool()
    first = pool.allocate((5 * LARGE,), torch.float32)
    address = first.data_ptr()
    del first
    assert pool.allocate((3 * LARGE,), torch.float32).data_ptr() != address
    second = pool.allocate((4 * LARGE,), torch.float32)
    assert (second.data_ptr(), second.untyped_storage().nbytes()) == (address, 4 * ROUNDING_BYTES)
    del second
    assert pool.allocate((5 * LARGE,), torch.float32).data_ptr() == address


def test_memory_that_nothing_uses_for_a_while_goes() -> None:
    pool = BufferPool()
    first = pool.allocate((LARGE,), torch.float32)
    del first
    pool.trim(3600)
    assert pool.idle_bytes == ROUNDING_BYTES
    pool.trim(0)
    assert pool.idle_bytes == 0


def test_blocks_are_kept_up_to_a_number_and_those_that_go_are_told() -> None:
    idle = IdleBlocks[str](spare=3, max_blocks=2)
    assert [idle.put(10, "a"), idle.put(20, "b"), idle.put(10, "c")] == [[], [], ["a"]]
    assert (idle.take(21), idle.take(2), idle.take(10), idle.take(5)) == (None, None, "c", "b")
    assert idle.nbytes == 0


def test_blocks_are_kept_up_to_a_size_and_those_that_go_are_told() -> None:
    idle = IdleBlocks[str](spare=0, max_bytes=30)
    assert [idle.put(10, "a"), idle.put(20, "b"), idle.put(31, "c"), idle.put(15, "d")] == [[], [], ["c"], ["a", "b"]]
    assert (idle.nbytes, idle.take(10), idle.take(15)) == (15, None, "d")


def test_the_block_that_came_back_last_is_taken_first() -> None:
    idle = IdleBlocks[str](spare=0)
    for name in "abc":
        idle.put(10, name)
    assert [idle.take(10) for _ in range(4)] == ["c", "b", "a", None]


def test_free_memory_of_the_heap_goes() -> None:
    if platform.libc_ver()[0] != "glibc":
        assert not trim_heap()
        return
    process = psutil.Process()
    # Blocks below the size that is mapped by itself; the last one keeps the others from the end of the heap.
    blocks = [bytearray(64 << 10) for _ in range(2_000)]
    last = blocks.pop()
    before = process.memory_info().rss
    blocks.clear()
    trim_heap()
    assert process.memory_info().rss < before - (64 << 20)
    assert not any(last)
