"""`torch.cuda.Stream` and `torch.cuda.Event` of a `Machine`, and what is current in a thread."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cuda_sim.device import Machine, Point, Queue

Device = torch.device | str | int | None
HANDLE_BYTES = 64


class FakeStream:
    """A stream. Two objects of one queue are equal; a subclass names the machine."""

    machine: ClassVar[Machine]

    def __init__(self, device: Device = None, priority: int = 0, *, queue: Queue | None = None) -> None:
        self.queue = self.machine.new_queue(index_of(self.machine, device)) if queue is None else queue
        self.device = torch.device("cuda", self.queue.device)
        self.device_index = self.queue.device
        self.priority = priority
        self.cuda_stream = self.stream_id = self.queue.number

    def wait_event(self, event: FakeEvent) -> None:
        """Have what is queued from now on come after an event; one that was never recorded is over."""
        if event.point is not None:
            self.machine.launch(self.queue, "wait for an event", after=event.point)

    def wait_stream(self, stream: FakeStream) -> None:
        """Have what is queued from now on come after what another stream has by now."""
        self.machine.launch(self.queue, "wait for a stream", after=stream.queue.end)

    def record_event(self, event: Any = None) -> Any:
        """Record an event, a new one unless it is given."""
        event = torch.cuda.Event() if event is None else event  # type: ignore[no-untyped-call]
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Have the calling thread wait."""
        self.machine.wait([self.queue.end], "stream")

    def query(self) -> bool:
        """Whether all is over."""
        return self.machine.poll(self.queue.end)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeStream) and other.queue is self.queue

    def __hash__(self) -> int:
        return hash(id(self.queue))

    def __repr__(self) -> str:
        return repr(self.queue)


class FakeEvent:
    """An event; a subclass names the machine. point: where it was recorded last. exported: by handle."""

    machine: ClassVar[Machine]
    exported: ClassVar[dict[bytes, FakeEvent]]

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any
    ) -> None:
        if interprocess and enable_timing:
            raise RuntimeError("CUDA error: an event of several processes has no timing")
        self.point: Point | None = None
        self.interprocess = interprocess

    def record(self, stream: FakeStream | None = None) -> None:
        """Record on a stream, the current one of the current device unless it is given."""
        queue = self.machine.current_queue(self.machine.current_device) if stream is None else stream.queue
        self.point = self.machine.launch(queue, "record an event")

    def wait(self, stream: FakeStream | None = None) -> None:
        """Have a stream wait, the current one unless it is given."""
        queue = self.machine.current_queue(self.machine.current_device) if stream is None else stream.queue
        if self.point is not None:
            self.machine.launch(queue, "wait for an event", after=self.point)

    def query(self) -> bool:
        """Whether it is over."""
        return self.point is None or self.machine.poll(self.point)

    def synchronize(self) -> None:
        """Have the calling thread wait."""
        if self.point is not None:
            self.machine.wait([self.point], "event")

    def elapsed_time(self, _other: FakeEvent) -> float:
        """Milliseconds to another event: nothing takes time here."""
        return 0.0

    def ipc_handle(self) -> bytes:
        """By which another process has it."""
        if not self.interprocess:
            raise RuntimeError("CUDA error: the event was not made with interprocess=True")
        handle = len(self.exported).to_bytes(HANDLE_BYTES, "little")
        self.exported[handle] = self
        return handle

    @classmethod
    def from_ipc_handle(cls, device: Device, handle: bytes) -> FakeEvent:
        """The event that another process has exported."""
        if handle not in cls.exported:
            raise RuntimeError("CUDA error: invalid resource handle")
        cls.machine.touch(index_of(cls.machine, device))
        return cls.exported[handle]


def index_of(machine: Machine, device: Device) -> int:
    """The number of what torch.cuda takes for a device; one without a number is the calling thread's current one."""
    if isinstance(device, int):
        index = device
    else:
        named = torch.device("cuda" if device is None else device)
        if named.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {device}")
        index = machine.current_device if named.index is None else named.index
    if not 0 <= index < machine.devices:
        raise RuntimeError(f"CUDA error: invalid device ordinal ({device} of {machine.devices})")
    return index


@contextmanager
def current_device(machine: Machine, device: Device) -> Iterator[None]:
    """`torch.cuda.device(...)`."""
    before = machine.current_device
    machine.current_device = index_of(machine, device)
    try:
        yield
    finally:
        machine.current_device = before


@contextmanager
def current_stream(machine: Machine, stream: FakeStream | None) -> Iterator[None]:
    """`torch.cuda.stream(...)`: the stream's device is current inside, too."""
    if stream is None:
        yield
        return
    queue = stream.queue
    with current_device(machine, queue.device):
        before = machine.choose_queue(queue, queue.device)
        try:
            yield
        finally:
            machine.choose_queue(before, queue.device)
