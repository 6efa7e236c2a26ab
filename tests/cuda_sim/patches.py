"""torch.cuda as the code under test calls it, on a fake machine."""

from __future__ import annotations

import ctypes
import gc
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.cuda_sim.device import Machine
from tests.cuda_sim.memory import DEVICE_BYTES
from tests.cuda_sim.streams import (
    Device,
    FakeEvent,
    FakeStream,
    current_device,
    current_stream,
    index_of,
)
from tests.cuda_sim.tensors import FakeCudaMode, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


CUDA_TYPE, META_TYPE, DEVICE_TYPES = 1, 14, 16


def install(world: World, patch: pytest.MonkeyPatch) -> None:
    """Have torch see the devices of a machine, in this thread and those that it starts."""
    machine, memory = world.machine, world.memory
    stream_class: Any = type("Stream", (FakeStream,), {"machine": machine})
    event_class: Any = type("Event", (FakeEvent,), {"machine": machine, "exported": {}})

    def properties(device: Device = None) -> Any:
        index = index_of(machine, device)
        return SimpleNamespace(
            uuid=f"GPU-fake-{index}",
            name="Fake GPU",
            total_memory=DEVICE_BYTES,
            major=9,
            minor=0,
            multi_processor_count=1,
        )

    def set_device(device: Device) -> None:
        machine.current_device = index_of(machine, device)

    def memory_of(figures: list[int]) -> Callable[[Device], int]:
        def read(device: Device = None) -> int:
            return figures[index_of(machine, device)]

        return read

    def reset_peak(device: Device = None) -> None:
        index = index_of(machine, device)
        memory.peak[index] = memory.allocated[index]

    fakes: dict[str, Any] = {
        "Stream": stream_class,
        "Event": event_class,
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: machine.devices,
        "current_device": lambda: machine.current_device,
        "set_device": set_device,
        "device": lambda device: current_device(machine, device),
        "stream": lambda stream: current_stream(machine, stream),
        "current_stream": lambda device=None: stream_class(queue=machine.current_queue(index_of(machine, device))),
        "default_stream": lambda device=None: stream_class(queue=machine.default_queue(index_of(machine, device))),
        "synchronize": lambda device=None: machine.wait_for_device(index_of(machine, device)),
        "get_device_properties": properties,
        "get_device_name": lambda device=None: properties(device).name,
        "get_device_capability": lambda _device=None: (9, 0),
        "can_device_access_peer": lambda _device, _peer: True,
        "mem_get_info": lambda device=None: (DEVICE_BYTES - memory.reserved[index_of(machine, device)], DEVICE_BYTES),
        "memory_allocated": memory_of(memory.allocated),
        "max_memory_allocated": memory_of(memory.peak),
        "memory_reserved": memory_of(memory.reserved),
        "reset_peak_memory_stats": reset_peak,
        "empty_cache": lambda: None,
        "cudart": lambda: Cudart(world),
    }
    for name, fake in fakes.items():
        patch.setattr(torch.cuda, name, fake)
    patch.setattr(torch.version, "cuda", "12.0")
    _patch_as_tensor(world, patch)
    _patch_threads(world, patch)


class Cudart:
    """What `torch.cuda.cudart()` gives."""

    def __init__(self, world: World) -> None:
        self._world = world

    def cudaHostRegister(self, address: int, size: int, _flags: int) -> int:  # noqa: N802
        """Pin memory, in the context of the current device."""
        self._world.machine.touch(self._world.machine.current_device)
        self._world.pinned.register(address, size)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        """Unpin memory; a number other than 0 is an error."""
        return 0 if self._world.pinned.unregister(address) else 713

    def cudaGetErrorString(self, status: int) -> str:  # noqa: N802
        """What a number means."""
        return f"error {status}"


@contextmanager
def _guarding() -> Iterator[None]:
    """Give torch a guard for CUDA devices that does nothing: builds for the CPU have none and look for one.

    The guard of meta devices is one.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[CUDA_TYPE]
    guards[CUDA_TYPE] = guards[META_TYPE]
    try:
        yield
    finally:
        if before is not None:
            # A build for CUDA: tensors of the fake that are still there on other builds go on to find one.
            guards[CUDA_TYPE] = before


def _patch_as_tensor(world: World, patch: pytest.MonkeyPatch) -> None:
    as_tensor = torch.as_tensor

    def take(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        interface = None if isinstance(data, torch.Tensor) else getattr(data, "__cuda_array_interface__", None)
        if interface is None:
            return as_tensor(data, dtype=dtype, device=device)
        return world.at_address(interface["data"][0], interface["shape"][0], data)

    patch.setattr(torch, "as_tensor", take)


def _patch_threads(world: World, patch: pytest.MonkeyPatch) -> None:
    """Have new threads play the process of the one that starts them, on device 0 and default streams, as on CUDA."""
    machine = world.machine
    start, bootstrap = threading.Thread.start, threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def start_here(thread: threading.Thread) -> None:
        thread.__dict__["cuda_sim_process"] = machine.process
        start(thread)

    def run_there(thread: threading.Thread) -> None:
        with machine.in_process(thread.__dict__.get("cuda_sim_process", "main")), _seeing(world):
            bootstrap(thread)

    patch.setattr(threading.Thread, "start", start_here)
    patch.setattr(threading.Thread, "_bootstrap_inner", run_there)


@contextmanager
def fake_cuda(seed: int, devices: int = 4) -> Iterator[World]:
    """A machine whose queues run in the order of the seed; torch sees its devices inside, in threads started there."""
    world = World(Machine(seed, devices))
    with _guarding(), pytest.MonkeyPatch.context() as patch:
        install(world, patch)
        with _seeing(world):
            yield world
            if world.pinned.registered:
                # What is still pinned is let go of while there is somebody to tell.
                gc.collect()


@contextmanager
def _seeing(world: World) -> Iterator[None]:
    """Have the calling thread's torch make tensors of the world's devices."""
    lifts = torch._C._only_lift_cpu_tensors()
    # `torch.tensor` makes a CPU tensor then and moves it, which a mode sees.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with FakeCudaMode(world):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
