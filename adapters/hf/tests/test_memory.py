"""The engine's free memory bounds a forward; CUDA's own figures stand in for a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from eagle_target_hf.memory import ForwardMemory

if TYPE_CHECKING:
    import pytest

CUDA = torch.device("cuda", 0)


class Figures:
    """What CUDA says of a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.reserved, self.allocated, self.peak = 9000, 3000, 2000, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 20_000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)


def test_what_fits_is_what_is_free_over_the_most_that_a_token_took(monkeypatch: pytest.MonkeyPatch) -> None:
    figures, memory = Figures(monkeypatch), ForwardMemory(CUDA)
    assert memory.token_capacity() is None
    for tokens, peak in ((10, 2400), (10, 3000), (100, 3000)):
        with memory.measuring(tokens):
            figures.peak = peak
    assert memory.token_capacity() == int(0.9 * (9000 + 1000) / 100)
    figures.free, figures.reserved = 0, 2000
    assert memory.token_capacity() == 1


def test_nobody_asks_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = ForwardMemory(CUDA)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", None)
    with memory.measuring(10):
        pass


def test_other_devices_tell_nothing() -> None:
    memory = ForwardMemory(torch.device("cpu"))
    assert memory.token_capacity() is None
    with memory.measuring(10):
        pass
    assert memory.token_capacity() is None
