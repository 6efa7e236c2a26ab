"""The engine's free memory bounds a forward; CUDA's own figures stand in for a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from eagle_target_hf import HFEagle3TargetModel
from eagle_target_hf.memory import KEPT_FORWARDS, ForwardMemory
from eagle_target_hf.runner import HFTargetRunner

from . import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

CUDA = torch.device("cuda", 0)
# Of a token of an 8B target, and of a tile of logits beside it.
TOKEN = 204_800
HEAD = 600 << 20
FREE = 64_424_391_112


class Figures:
    """What CUDA says of a device: `taken` is what forwards take at their peak, above what is taken for good."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.reserved, self.allocated = FREE - 1000, 3000, 2000
        self.taken, self.resets = 0, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 80 << 30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.allocated + self.taken)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self._reset())

    def _reset(self) -> None:
        self.taken = 0
        self.resets += 1


class Device:
    """Forwards on the device of the figures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.figures, self.memory = Figures(monkeypatch), ForwardMemory(CUDA)
        assert self.memory.token_capacity() is None

    def forward(self, tokens: int, *, fixed: int = 0, token: int = TOKEN, head: int = 0) -> None:
        """One of so many tokens; a head takes so much beside it."""
        with self.memory.measuring(tokens):
            if head:
                self.memory.note_head()
            self.figures.taken += fixed + tokens * token + head


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_what_fits_is_what_is_free_over_what_a_token_took(device: Device) -> None:
    device.forward(8192)
    assert device.memory.token_capacity() == int(0.9 * FREE / TOKEN) == 283_115
    device.figures.free, device.figures.reserved = 0, 2000
    assert device.memory.token_capacity() == 1


def test_a_forward_of_a_few_tokens_beside_a_head_does_not_decide(device: Device) -> None:
    device.forward(8192)
    device.forward(3, head=HEAD)
    assert device.memory.token_capacity() == 283_115
    device.forward(1000, head=HEAD)
    assert device.memory.token_capacity() == 283_115


def test_forwards_of_a_few_tokens_alone_tell_nothing_of_a_token(device: Device) -> None:
    for tokens in (1, 64, 65, 1023):
        device.forward(tokens, fixed=HEAD)
    assert device.memory.token_capacity() is None


@pytest.mark.parametrize("tokens", [65, 1023])
def test_what_is_between_tells_nothing_of_the_fixed_part(device: Device, tokens: int) -> None:
    device.forward(1024)
    device.forward(tokens)
    assert device.memory.token_capacity() == 283_115


@pytest.mark.parametrize("tokens", [1024, 8192])
def test_the_fixed_part_is_no_token_s(device: Device, tokens: int) -> None:
    fixed = 200 << 20
    device.forward(tokens, fixed=fixed)
    device.forward(2, fixed=fixed, token=0)
    assert device.memory.token_capacity() == int((0.9 * FREE - fixed) / TOKEN)


def test_a_fixed_part_that_was_no_such_thing_is_bounded(device: Device) -> None:
    device.forward(1024)
    device.forward(2, fixed=10 * HEAD)
    capacity = device.memory.token_capacity()
    assert capacity == int((0.9 * FREE - 10 * HEAD - 2 * TOKEN) / (TOKEN / 2))


def test_a_forward_beside_a_head_counts_until_one_was_alone(device: Device) -> None:
    device.forward(2048, head=HEAD)
    assert device.memory.token_capacity() == int(0.9 * FREE / (TOKEN + HEAD / 2048))
    device.forward(16_384, head=HEAD)
    device.forward(1024, head=HEAD)
    assert device.memory.token_capacity() == int(0.9 * FREE / (TOKEN + HEAD / 16_384))
    device.forward(1024)
    device.forward(1024, head=HEAD)
    assert device.memory.token_capacity() == 283_115


def test_a_forward_that_took_more_is_forgotten_after_a_while(device: Device) -> None:
    device.forward(4096, token=10 * TOKEN)
    for _ in range(KEPT_FORWARDS - 1):
        device.forward(4096)
        assert device.memory.token_capacity() == 283_115 // 10
    device.forward(4096)
    assert device.memory.token_capacity() == 283_115


def test_a_forward_that_failed_tells_nothing(device: Device) -> None:
    device.forward(4096)
    device.figures.taken = 1
    with pytest.raises(torch.cuda.OutOfMemoryError), device.memory.measuring(8192):
        raise torch.cuda.OutOfMemoryError("no memory")
    assert device.memory.token_capacity() == 283_115


def test_nobody_asks_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    figures, memory = Figures(monkeypatch), ForwardMemory(CUDA)
    with memory.measuring(4096):
        memory.note_head()
    assert not figures.resets
    assert memory.token_capacity() is None


def test_other_devices_tell_nothing() -> None:
    memory = ForwardMemory(torch.device("cpu"))
    assert memory.token_capacity() is None
    with memory.measuring(4096):
        pass
    assert memory.token_capacity() is None


def measured_on_cuda(runner: HFTargetRunner) -> HFTargetRunner:
    runner._memory = ForwardMemory(CUDA)
    return runner


def test_a_target_in_the_trainer_s_process_leaves_its_peak_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = Figures(monkeypatch)
    ids = torch.full((2, 600), 5)
    with HFEagle3TargetModel(tiny.build("llama"), (0, 2, 3), encoding="logits", max_batch_tokens=2000) as target:
        assert isinstance(target.runner, HFTargetRunner)
        measured_on_cuda(target.runner)
        target.generate_batch(ids[:, :64], *[torch.ones_like(ids[:, :64])] * 2)
    assert not figures.resets


def test_a_runner_s_forward_and_head_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = Figures(monkeypatch)
    runner = measured_on_cuda(HFTargetRunner(tiny.build("llama")))
    runner.set_aux_layers((0, 2, 3))
    assert runner.token_capacity() is None
    lengths = [64] * 32
    ids = torch.full((sum(lengths),), 5)

    def run(beside: Callable[[], object]) -> None:
        def peak(device: torch.device) -> int:
            beside()
            return figures.allocated + 2048 * TOKEN

        monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
        runner.forward_eagle3(ids, lengths)

    run(lambda: runner.compute_logits(torch.zeros(1, tiny.HIDDEN)))
    assert (len(runner._memory._alone), len(runner._memory._accompanied)) == (0, 1)
    run(lambda: None)
    assert (len(runner._memory._alone), len(runner._memory._accompanied)) == (1, 1)
    assert runner.token_capacity() == 283_115
