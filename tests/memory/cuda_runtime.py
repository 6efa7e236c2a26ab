"""What stands for CUDA's runtime where memory is registered: it counts, and refuses as the real one does."""

from __future__ import annotations

import ctypes
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from eagle_target import memory
from eagle_target.memory import new_block

if TYPE_CHECKING:
    import mmap
    from contextlib import AbstractContextManager

    import pytest

CUDA = torch.device("cuda", 3)


class Runtime:
    """Registered ranges, and what a test wants to go wrong.

    limit: bytes that may be registered. devices: that were current for calls. last_error: of a call that failed, until
    it is asked for. unmapped: ranges that went while they were registered.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: dict[int, int] = {}
        self.registrations = 0
        self.limit = 1 << 40
        self.unregistering_fails = False
        self.devices: list[torch.device] = []
        self.last_error = 0
        self.libraries: list[str] = []
        self.unmapped: list[int] = []
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", self._device)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(ctypes, "CDLL", self._library)
        monkeypatch.setattr(memory, "new_block", self._watched_block)

    @property
    def registered(self) -> int:
        """Bytes."""
        return sum(self.ranges.values())

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one registered range."""
        start = tensor.data_ptr()
        return any(low <= start and start + tensor.nbytes <= low + size for low, size in self.ranges.items())

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 1
        if any(address < low + other and low < address + size for low, other in self.ranges.items()):
            return self._fail(712)
        if self.registered + size > self.limit:
            return self._fail(2)
        self.ranges[address] = size
        self.registrations += 1
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        if self.unregistering_fails or address not in self.ranges:
            return self._fail(713)
        del self.ranges[address]
        return 0

    def cudaGetErrorString(self, status: int) -> str:  # noqa: N802
        return f"error {status}, in words"

    def _fail(self, status: int) -> int:
        self.last_error = status
        return status

    def _device(self, device: torch.device) -> AbstractContextManager[None]:
        self.devices.append(device)
        return nullcontext()

    def _library(self, name: str) -> Any:
        self.libraries.append(name)

        def take_last_error() -> int:
            status, self.last_error = self.last_error, 0
            return status

        return SimpleNamespace(cudaGetLastError=take_last_error)

    def _watched_block(self, size: int) -> mmap.mmap:
        block = new_block(size)
        address = torch.frombuffer(block, dtype=torch.uint8).data_ptr()

        def check() -> None:
            if address in self.ranges:
                self.unmapped.append(address)

        weakref.finalize(block, check).atexit = False
        return block
