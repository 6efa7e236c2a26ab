"""Devices and their numbers, without one that has any."""

from __future__ import annotations

import threading

import pytest
import torch

from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.devices import is_numbered, resolve_device, use_device
from eagle_target.errors import ConfigError
from eagle_target.testing.tiny import EmbeddingRunner


def test_a_device_without_a_number_gets_the_calling_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3 if threading.current_thread().name == "trainer" else 0)
    found: list[torch.device] = []
    thread = threading.Thread(target=lambda: found.append(resolve_device("cuda")), name="trainer")
    thread.start()
    thread.join()
    assert found == [torch.device("cuda:3")]
    assert resolve_device(torch.device("cuda")) == torch.device("cuda:0")
    assert resolve_device("cuda:2") == torch.device("cuda:2")


def test_a_backend_has_one_device_for_all_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with RunnerEagle3TargetModel(EmbeddingRunner(), device="cuda") as target:
        assert target.form.device == torch.device("cuda:3")


def test_a_device_that_is_not_there_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise RuntimeError("no CUDA driver")

    monkeypatch.setattr(torch.cuda, "current_device", fail)
    with pytest.raises(ConfigError, match="'cuda' cannot be used: no CUDA driver"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match="'gpu7' cannot be used"):
        resolve_device("gpu7")


def test_the_cpu_needs_no_number() -> None:
    cpu = torch.device("cpu")
    assert resolve_device("cpu") == cpu
    assert is_numbered(cpu)
    assert not is_numbered(torch.device("cuda"))
    use_device(cpu)
