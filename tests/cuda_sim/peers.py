"""What connects processes that share a machine: CUDA IPC at the seam of `shm`, and NCCL at that of `nccl`."""

from __future__ import annotations

import secrets
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from eagle_target_nccl import interfaces
from eagle_target_nccl.groups import SERVER, UNIQUE_ID_BYTES, UNIQUE_ID_KEY
from torch import distributed

from tests.cuda_sim.device import Spin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest
    import torch

    from tests.cuda_sim.device import Machine, Point, Queue
    from tests.cuda_sim.tensors import CudaTensor, World

HANDLE_BYTES = 64


class FakeRuntime:
    """`eagle_target_shm.cuda.Runtime`, whose processes are all this one."""

    def __init__(self, world: World) -> None:
        self._world = world

    def allocate(self, size: int) -> int:
        """As cudaMalloc, on the current device."""
        return self._world.memory.allocate_raw(self._world.machine.current_device, size)

    def free(self, address: int) -> None:
        """As cudaFree."""
        self._world.memory.free_raw(address)

    def export(self, address: int) -> bytes:
        """As cudaIpcGetMemHandle."""
        return address.to_bytes(HANDLE_BYTES, "little")

    def open(self, handle: bytes) -> int:
        """As cudaIpcOpenMemHandle: where the exporter has it."""
        address = int.from_bytes(handle, "little")
        self._world.memory.find_raw(address)
        return address

    def close(self, address: int) -> None:
        """As cudaIpcCloseMemHandle."""


def install_peers(world: World, patch: pytest.MonkeyPatch) -> None:
    """Let `shm` share device memory, and `nccl` join two devices."""
    patch.setattr("eagle_target_shm.cuda.Runtime", lambda: FakeRuntime(world))
    links: defaultdict[bytes, _Link] = defaultdict(_Link)

    class ProcessGroupNCCL(FakeProcessGroup):
        """One end of a pair."""

        Options = _Options

        def __init__(self, store: Any, rank: int, _size: int, _options: Any) -> None:
            super().__init__(world.machine, rank, lambda: links[_agree(store, rank)])

    patch.setenv(interfaces.SETTING, "=lo")
    patch.setattr(distributed, "ProcessGroupNCCL", ProcessGroupNCCL, raising=False)
    patch.setattr(distributed, "is_nccl_available", lambda: True)


def _agree(store: Any, rank: int) -> bytes:
    """NCCL's id, which rank 0 leaves in its store at the first message."""
    if rank == SERVER:
        store.set(UNIQUE_ID_KEY, secrets.token_bytes(UNIQUE_ID_BYTES))
    return bytes(store.get(UNIQUE_ID_KEY))


class _Options:
    def __init__(self) -> None:
        self.config = SimpleNamespace(blocking=1)
        self._timeout: Any = None


@dataclass(slots=True, eq=False)
class _Transfer:
    """One send and the receive that it meets. ready: where the sender's data is there."""

    ready: Point | None = None
    received: Point | None = None
    source: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class _Link:
    """Transfers of each direction, by the rank that sends them; both ends post them in the same order."""

    transfers: dict[int, list[_Transfer]] = field(default_factory=lambda: {0: [], 1: []})
    posted: dict[tuple[int, bool], int] = field(default_factory=dict)
    is_aborted: bool = False

    def next(self, sender: int, *, sends: bool) -> _Transfer:
        """The next one, as one end posts it."""
        number = self.posted.get((sender, sends), 0)
        self.posted[sender, sends] = number + 1
        while len(self.transfers[sender]) <= number:
            self.transfers[sender].append(_Transfer())
        return self.transfers[sender][number]


class FakeProcessGroup:
    """One end of two, as `ProcessGroupNCCL` is: an internal stream that follows the current one, and kernels that spin.

    A send spins until the receive of its peer runs, and the other way round.
    """

    def __init__(self, machine: Machine, rank: int, find_link: Callable[[], _Link]) -> None:
        self._machine = machine
        self._rank = rank
        self._find_link = find_link
        self._found: _Link | None = None
        self._queue = machine.new_queue(machine.current_device)

    @property
    def _link(self) -> _Link:
        if self._found is None:
            self._found = self._find_link()
        return self._found

    def send(self, tensors: Sequence[CudaTensor], _peer: int, _tag: int) -> FakeWork:
        """Queue a send of one tensor."""
        tensor = tensors[0]
        with self._machine.lock:
            transfer = self._link.next(self._rank, sends=True)
            self._follow_current(tensor)
            transfer.source = tensor.inner
            transfer.ready = self._machine.launch(self._queue, "a send begins")
            link = self._link

            def has_been_received() -> bool:
                return link.is_aborted or (transfer.received is not None and transfer.received.reached)

            end = self._machine.launch(self._queue, "a send", gate=Spin("a send", has_been_received))
        return FakeWork(self._machine, link, end, tensor)

    def recv(self, tensors: Sequence[CudaTensor], peer: int, _tag: int) -> FakeWork:
        """Queue a receive into one tensor."""
        tensor, link = tensors[0], self._link
        with self._machine.lock:
            transfer = link.next(peer, sends=False)
            self._follow_current(tensor)

            def is_sent() -> bool:
                return link.is_aborted or (transfer.ready is not None and transfer.ready.reached)

            def run() -> None:
                if not link.is_aborted and transfer.source is not None:
                    tensor.inner.copy_(transfer.source)

            end = self._machine.launch(self._queue, "a receive", run, gate=Spin("a receive", is_sent))
            transfer.received = end
            self._machine.lock.notify_all()
        return FakeWork(self._machine, link, end, tensor)

    def abort(self) -> None:
        """End what spins, at both ends."""
        with self._machine.lock:
            if self._found is not None:
                self._found.is_aborted = True
            self._machine.lock.notify_all()

    def _follow_current(self, tensor: CudaTensor) -> None:
        if tensor.device_index != self._queue.device:
            raise RuntimeError(f"NCCL error: the communicator is on cuda:{self._queue.device}, the tensor {tensor!r}")
        current: Queue = self._machine.current_queue(tensor.device_index)
        self._machine.launch(self._queue, "follow the current stream", after=current.end)
        if not tensor.holder.block.is_foreign:
            tensor.holder.block.used_on.add(self._queue)


class FakeWork:
    """What a send or receive gives back."""

    def __init__(self, machine: Machine, link: _Link, end: Point, tensor: CudaTensor) -> None:
        self._machine = machine
        self._link = link
        self._end = end
        self._tensor = tensor

    def is_completed(self) -> bool:
        """Whether it is over."""
        return self._machine.poll(self._end)

    def wait(self) -> None:
        """Have the current stream wait for it."""
        if self._link.is_aborted:
            raise RuntimeError("NCCL communicator was aborted")
        self._machine.launch(self._machine.current_queue(self._tensor.device_index), "wait for NCCL", after=self._end)
