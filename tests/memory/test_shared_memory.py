"""Memory that processes share: opened by whoever may, of fixed size, gone with the last who has it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
from typing import TYPE_CHECKING

import pytest
import torch

from eagle_target.memory import tensor_in
from eagle_target.shared_memory import SharedBlock

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 8192


def tensor_of(block: SharedBlock, released: Callable[[], object] = int) -> torch.Tensor:
    return tensor_in(block.map, 0, (SIZE // 8,), torch.int64, released)


def write_seven(pid: int, descriptor: int) -> None:
    tensor_of(SharedBlock.open(pid, descriptor, SIZE)).fill_(7)


def test_another_process_opens_a_block_by_its_descriptor() -> None:
    block = SharedBlock.create(SIZE)
    child = multiprocessing.get_context("spawn").Process(target=write_seven, args=(os.getpid(), block.descriptor))
    child.start()
    child.join(60)

    assert child.exitcode == 0
    assert bool((tensor_of(block) == 7).all())


def test_a_block_is_handed_over_by_its_descriptor_which_stays_open() -> None:
    block = SharedBlock.create(SIZE)
    tensor_of(block).fill_(5)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [block.descriptor])
        _, (given,), _, _ = socket.recv_fds(theirs, 1, 1)

    received = SharedBlock.receive(given, SIZE)
    del block

    assert bool((tensor_of(received) == 5).all())
    assert received.descriptor != given
    assert os.fstat(given).st_size == SIZE
    os.close(given)


def test_nobody_changes_the_size_of_a_block() -> None:
    block = SharedBlock.create(SIZE)
    for size in (0, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(block.descriptor, size)


def test_a_released_block_is_opened_no_more_and_kept_by_who_has_it() -> None:
    block = SharedBlock.create(SIZE)
    descriptor = block.descriptor
    other = SharedBlock.open(os.getpid(), descriptor, SIZE)
    block.release()
    block.release()

    with pytest.raises(OSError, match=r"No such file|Bad file"):
        SharedBlock.open(os.getpid(), descriptor, SIZE)
    tensor_of(block).fill_(3)
    assert bool((tensor_of(other) == 3).all())


@pytest.mark.parametrize("size", [0, SIZE - 1, 2 * SIZE])
def test_a_block_of_another_size_than_announced_is_refused(size: int) -> None:
    block = SharedBlock.create(SIZE)
    message = f"shared memory has {SIZE} bytes and seals 7, expected {size}"
    with pytest.raises(ValueError, match=message):
        SharedBlock.receive(block.descriptor, size)
    with pytest.raises(ValueError, match=message):
        SharedBlock.open(os.getpid(), block.descriptor, size)


def test_memory_whose_size_may_change_is_refused() -> None:
    descriptor = os.memfd_create("loose", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SIZE)
    with pytest.raises(ValueError, match=f"shared memory has {SIZE} bytes and seals 0"):
        SharedBlock.receive(descriptor, SIZE)
    os.close(descriptor)


def test_an_empty_block_has_a_byte() -> None:
    assert SharedBlock.create(0).size == 1


def test_a_forgotten_block_closes_its_descriptor_and_stays_mapped_for_its_tensors() -> None:
    block = SharedBlock.create(SIZE)
    descriptor, released = block.descriptor, list[None]()
    tensor = tensor_of(block, lambda: released.append(None))
    view = tensor[3:5].fill_(4)
    del block, tensor
    gc.collect()

    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
    assert view.tolist() == [4, 4]
    assert not released
    del view
    assert len(released) == 1


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE + 1), (1, SIZE), (SIZE, 1), (0, 0)])
def test_a_tensor_outside_a_block_is_refused(offset: int, length: int) -> None:
    block = SharedBlock.create(SIZE)
    with pytest.raises(ValueError, match=f"{length} bytes at {offset} are no part of a block of {SIZE} bytes"):
        tensor_in(block.map, offset, (length,), torch.uint8, int)
