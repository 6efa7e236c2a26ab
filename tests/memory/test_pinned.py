"""Pinned memory: as much as is needed, given back, and never unmapped or used again too early."""

from __future__ import annotations

import gc
import logging
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from eagle_target.memory import ROUNDING_BYTES, SLAB_BYTES, PinnedPool, Registration, new_block
from tests.memory.cuda_runtime import CUDA, Runtime

if TYPE_CHECKING:
    from collections.abc import Iterator

SLAB = ROUNDING_BYTES
MIB = 1 << 20


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = Runtime(monkeypatch)
    yield runtime
    gc.collect()
    assert runtime.unmapped == []


def small_pool(**options: int) -> PinnedPool:
    return PinnedPool(CUDA, slab_bytes=SLAB, **options)


def bytes_of(pool: PinnedPool, size: int) -> torch.Tensor:
    return pool.allocate((size,), torch.uint8)


# How much


def test_memory_is_not_rounded_to_powers_of_two(runtime: Runtime) -> None:
    pool = PinnedPool(CUDA)
    held = [bytes_of(pool, size) for size in (2100 * MIB, 201 * MIB, 129 * MIB)]
    assert runtime.registered == pool.pinned_bytes == (2100 + 202 + 130) * MIB
    assert all(runtime.is_pinned(tensor) for tensor in held)


def test_small_tensors_share_a_slab(runtime: Runtime) -> None:
    pool = PinnedPool(CUDA)
    held = [pool.allocate((100, 25), torch.float32) for _ in range(1000)]
    assert runtime.registered == SLAB_BYTES
    assert all(runtime.is_pinned(tensor) for tensor in held)


def test_memory_is_registered_for_the_device_it_is_for(runtime: Runtime) -> None:
    pool = small_pool()
    bytes_of(pool, 5)
    pool.close()
    assert runtime.devices == [CUDA, CUDA]


@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (300_000,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_shapes_and_dtypes(runtime: Runtime, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = small_pool().allocate(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert tensor.fill_(1).eq(1).all()
    assert tensor.data_ptr() % 512 == 0
    assert runtime.is_pinned(tensor)


def test_nothing_needs_no_memory(runtime: Runtime) -> None:
    assert small_pool().allocate((0, 4), torch.float32).shape == (0, 4)
    assert runtime.registrations == 0


# Used again


def test_what_was_let_go_of_is_used_again(runtime: Runtime) -> None:
    pool = small_pool()
    for size in (700_000, 5000, 1_000_000, 300_000):
        bytes_of(pool, size)
    assert (runtime.registrations, runtime.registered) == (1, SLAB)


def test_a_part_between_others_is_used_again(runtime: Runtime) -> None:
    pool = small_pool()
    first, second, third, fourth = (bytes_of(pool, SLAB // 4) for _ in range(4))
    address = second.data_ptr()
    del second, third
    again = bytes_of(pool, SLAB // 2)
    assert again.data_ptr() == address
    assert (first.nbytes, fourth.nbytes, runtime.registrations) == (SLAB // 4, SLAB // 4, 1)


def test_what_is_in_use_is_nobody_elses(runtime: Runtime) -> None:
    pool, draw = small_pool(max_idle_bytes=4 * SLAB), random.Random(0)
    held: list[tuple[int, torch.Tensor]] = []
    for number in range(300):
        tensor = bytes_of(pool, draw.choice([1, 600, 40_000, 500_000, 3 * SLAB]))
        held.append((number % 251, tensor.fill_(number % 251)[tensor.numel() // 2 :]))
        del tensor
        while len(held) > 12:
            value, view = held.pop(draw.randrange(len(held)))
            assert view.eq(value).all()
            del view
        if number % 50 == 0:
            pool.trim(0)
    assert all(runtime.is_pinned(view) and view.eq(value).all() for value, view in held)


def test_threads_never_share_memory(runtime: Runtime) -> None:
    pool, start = small_pool(max_idle_bytes=2 * SLAB), threading.Barrier(4)

    def work(number: int) -> None:
        start.wait(20)
        for step in range(40):
            tensor = bytes_of(pool, 1000 + step % 3 * SLAB).fill_(number)
            view = tensor[step:]
            del tensor
            if step % 10 == number:
                pool.trim(0)
            assert view.eq(number).all()

    with ThreadPoolExecutor(4) as executor:
        for future in [executor.submit(work, number) for number in range(4)]:
            future.result(60)
    pool.close()
    assert runtime.registered == 0


# Given back


def test_trimming_gives_back_what_nothing_is_in(runtime: Runtime) -> None:
    pool = small_pool()
    held, gone = bytes_of(pool, SLAB).fill_(3), bytes_of(pool, SLAB)
    del gone
    pool.trim(3600)
    assert runtime.registered == 2 * SLAB
    pool.trim(0)
    assert runtime.registered == SLAB
    assert runtime.is_pinned(held)
    assert held.eq(3).all()
    view = held[5:6]
    del held
    pool.trim(0)
    assert runtime.is_pinned(view)
    del view
    pool.trim(0)
    assert runtime.registered == pool.pinned_bytes == 0


def test_closing_gives_back_what_is_free_now_and_the_rest_when_it_is_let_go_of(runtime: Runtime) -> None:
    pool = small_pool()
    first, second, gone = (bytes_of(pool, SLAB) for _ in range(3))
    del gone
    pool.close()
    assert runtime.registered == 2 * SLAB
    assert runtime.is_pinned(first)
    assert runtime.is_pinned(second)
    del first
    assert runtime.registered == SLAB
    del second
    assert runtime.registered == 0
    after = bytes_of(pool, SLAB)
    assert not runtime.is_pinned(after)
    pool.close()


def test_idle_memory_is_bounded_and_goes_in_the_order_of_its_last_use(runtime: Runtime) -> None:
    pool = small_pool(max_idle_bytes=6 * MIB)
    held = {size: bytes_of(pool, size * MIB) for size in (2, 4, 6)}
    assert runtime.registered == 12 * MIB
    for size in (4, 2, 6):
        del held[size]
        pool.trim(3600)
    assert sorted(runtime.ranges.values()) == [6 * MIB]


def test_a_pool_that_nobody_closed_keeps_nothing(runtime: Runtime) -> None:
    pool = small_pool()
    held = bytes_of(pool, SLAB).fill_(1)
    bytes_of(pool, 3 * SLAB)
    del pool
    gc.collect()
    assert runtime.is_pinned(held)
    del held
    gc.collect()
    assert runtime.registered == 0


# What goes wrong


def test_where_cuda_pins_no_more_memory_is_pageable_and_one_line_says_so(
    runtime: Runtime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65_536, 65_536))
    runtime.limit = SLAB
    pool = small_pool()
    first = bytes_of(pool, SLAB)
    with caplog.at_level(logging.WARNING):
        others = [pool.allocate((ROUNDING_BYTES,), torch.uint8).fill_(9) for _ in range(3)]
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA pins no 2097152 bytes beside 2097152, so copies of answers are slower: cudaHostRegister says error 2, in "
        "words (2): the process may lock 65536 bytes (RLIMIT_MEMLOCK)"
    ]
    assert not any(runtime.is_pinned(tensor) for tensor in others)
    assert all(tensor.eq(9).all() for tensor in others)
    del first
    pool.trim(0)
    assert runtime.is_pinned(bytes_of(pool, ROUNDING_BYTES))
    assert len(caplog.records) == 1


def test_a_failure_leaves_no_error_for_the_next_kernel(runtime: Runtime) -> None:
    runtime.limit = 0
    bytes_of(small_pool(), SLAB)
    assert runtime.last_error == 0
    assert runtime.libraries == ["libcudart.so.12"]


def test_a_runtime_that_is_not_there_has_no_error(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"no {name}")

    monkeypatch.setattr("ctypes.CDLL", absent)
    runtime.limit = 0
    assert not runtime.is_pinned(bytes_of(small_pool(), SLAB))


def test_what_is_registered_already_is_told(runtime: Runtime) -> None:
    block = new_block(SLAB)
    registration = Registration(CUDA, block)
    with pytest.raises(OSError, match=r"error 712, in words \(712\): something else has registered a part of it"):
        Registration(CUDA, block)
    assert runtime.last_error == 0
    registration.release()
    registration.release()
    assert runtime.registered == 0


def test_memory_that_cuda_does_not_let_go_of_is_kept(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    pool = small_pool()
    bytes_of(pool, SLAB)
    runtime.unregistering_fails = True
    with caplog.at_level(logging.WARNING):
        pool.close()
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA does not unpin 2097152 bytes, which are kept: cudaHostUnregister says error 713, in words (713)"
    ]
    assert runtime.last_error == 0
    assert runtime.registered == SLAB
    assert runtime.unmapped == []
    runtime.ranges.clear()


def test_memory_is_kept_whatever_stands_in_the_way(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    registration = Registration(CUDA, new_block(SLAB))
    monkeypatch.setattr(runtime, "cudaHostUnregister", None)
    with pytest.raises(TypeError):
        registration.release()
    gc.collect()
    assert runtime.unmapped == []
    runtime.ranges.clear()


def test_without_cuda_memory_is_pageable(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("has CUDA")
    with caplog.at_level(logging.WARNING):
        tensor = bytes_of(small_pool(), SLAB).fill_(4)
    assert tensor.eq(4).all()
    assert len(caplog.records) == 1


def test_a_forked_process_leaves_its_parents_registrations_alone(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = small_pool()
    bytes_of(pool, SLAB)
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    pool.close()
    assert runtime.registered == SLAB
    assert runtime.devices == [CUDA]
    # Unmapped in the child alone.
    assert len(runtime.unmapped) == 1
    runtime.unmapped.clear()


@pytest.mark.gpu
def test_on_cuda_memory_is_pinned_until_it_is_given_back() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pool = PinnedPool(torch.device("cuda:0"))
    for shape in ((1000, 1000), (5,), (40, 1 << 20)):
        tensor = pool.allocate(shape, torch.float32)
        assert tensor.is_pinned()
        tensor.copy_(torch.full(shape, 2.0, device="cuda:0"), non_blocking=True)
        torch.cuda.current_stream("cuda:0").synchronize()
        assert tensor.eq(2).all()
    block = new_block(SLAB)
    registration = Registration(torch.device("cuda:0"), block)
    with pytest.raises(OSError, match="something else has registered"):
        Registration(torch.device("cuda:0"), block)
    # Where the error was left, this would raise it.
    assert torch.ones(3, device="cuda:0").mul(2).sum().item() == 6
    registration.release()
    del tensor
    pool.close()
    assert pool.pinned_bytes == 0
