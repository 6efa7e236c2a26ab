"""Copies from a device, piece by piece; on the CPU the pieces, on a GPU the pinned buffers and their events, too."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch
from eagle_target_sglang.messages import share
from eagle_target_sglang.pinned import PinnedCopier

DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.bool)


class Runtime:
    """Stands for CUDA where memory is registered and copied to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: dict[int, int] = {}
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: self)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.ranges[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.ranges[address]
        return 0

    def record_event(self) -> Runtime:
        return self

    def synchronize(self) -> None:
        pass


def check_copies(device: torch.device, dtype: torch.dtype, elements: int) -> None:
    copier = PinnedCopier(device, buffer_bytes=96)
    for seed in (0, 1):
        given = torch.randint(-5, 5, (elements, 7), generator=torch.Generator().manual_seed(seed)).to(device)
        target = torch.empty(elements, 7, dtype=dtype)
        copier.copy(target, given)
        assert torch.equal(target, given.cpu().to(dtype))
        # Columns of a wider tensor, as logits without the columns of a padded head are.
        columns = torch.empty(elements, 3, dtype=dtype)
        copier.copy(columns, given[:, :3])
        assert torch.equal(columns, target[:, :3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [0, 1, 12, 500])
def test_pieces_are_put_together(dtype: torch.dtype, elements: int) -> None:
    check_copies(torch.device("cpu"), dtype, elements)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [0, 1, 12, 500])
def test_pinned_pieces_are_put_together(dtype: torch.dtype, elements: int) -> None:
    assert torch.cuda.is_available(), "needs a CUDA device, has none"
    check_copies(torch.device("cuda", 0), dtype, elements)


@pytest.mark.gpu
def test_tensors_of_a_device_are_shared_through_pinned_buffers() -> None:
    assert torch.cuda.is_available(), "needs a CUDA device, has none"
    device = torch.device("cuda", 0)
    given = {"large": torch.randn(3 << 20, 7, device=device), "bfloat16": torch.randn(5, 7, device=device).bfloat16()}
    shared = share(given, PinnedCopier(device))
    for name, tensor in given.items():
        assert torch.equal(shared[name], tensor.cpu())
    shared.close()


def test_the_buffers_are_pinned_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, copier = Runtime(monkeypatch), PinnedCopier(torch.device("cuda:0"), buffer_bytes=3 << 20)
    given, target = torch.arange(5 << 20), torch.empty(5 << 20, dtype=torch.int64)
    copier.copy(target, given)
    assert torch.equal(target, given)
    assert list(runtime.ranges.values()) == [6 << 20]
    del copier
    gc.collect()
    assert runtime.ranges == {}
