"""Streams as queues that run only when something waits for them, and then in an order that a seed chooses.

The memory behind them is the CPU's, and whoever waits runs what it waits for.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SyncKind = Literal["stream", "event", "device", "copy", "staged", "value"]
Order = Literal["needed", "others", "mixed"]

# Seeds below this run by one order throughout; from it on each wait draws its own.
PURE: tuple[Order, ...] = ("needed", "others", "mixed")
POLL_SECONDS = 1.0


class Stuck(AssertionError):
    """A wait for what does not end before something happens elsewhere: on a GPU it would hang, or be far too long."""


class DeviceFault(RuntimeError):
    """Work that was queued failed when it ran; the error is its cause."""


class Gate:
    """Stands for work that takes long. Whoever waits for it while it is closed is told so by `Stuck`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.was_opened = False

    @property
    def is_open(self) -> bool:
        """Whether the work can be over."""
        return self.was_opened


class Spin(Gate):
    """A kernel that spins until its peer's runs: waited for, unless a whole device waits.

    is_met: whether the peer's does.
    """

    def __init__(self, name: str, is_met: Callable[[], bool]) -> None:
        super().__init__(name)
        self._is_met = is_met

    @property
    def is_open(self) -> bool:
        """Whether the two have met, or were given up."""
        return self.was_opened or self._is_met()


@dataclass(slots=True, eq=False)
class Work:
    """One entry of a queue. run: what it does. after: where another stream must be first. gate: what holds it up."""

    label: str
    run: Callable[[], None] | None = None
    after: Point | None = None
    gate: Gate | None = None


class Queue:
    """One stream. owner: the process whose stream it is. number: 0 for a device's default stream."""

    def __init__(self, owner: str, device: int, number: int) -> None:
        self.owner = owner
        self.device = device
        self.number = number
        self.done = 0
        self.waiting: deque[Work] = deque()

    @property
    def end(self) -> Point:
        """After all that was queued by now."""
        return Point(self, self.done + len(self.waiting))

    def __repr__(self) -> str:
        return f"stream {self.number} of cuda:{self.device} in {self.owner!r}"


@dataclass(frozen=True, slots=True)
class Point:
    """After so many works of a queue."""

    queue: Queue
    index: int

    @property
    def reached(self) -> bool:
        """Whether they are done."""
        return self.queue.done >= self.index


@dataclass(frozen=True, slots=True)
class Sync:
    """A call in which the host waited for a device. site: the file and line that made it. thread: its name."""

    kind: SyncKind
    device: int
    thread: str
    site: str


class Machine:
    """All devices of a machine, as seen by every process and thread of a test.

    Args:
        seed: chooses the order in which what was queued runs. devices: how many there are.
    """

    def __init__(self, seed: int, devices: int) -> None:
        self.seed = seed
        self.devices = devices
        self.syncs: list[Sync] = []
        # Devices on which a process has a context: each costs memory there.
        self.contexts: set[tuple[str, int]] = set()
        self.queues: list[Queue] = []
        self.lock = threading.Condition(threading.RLock())
        # What is to be done before queues are looked at.
        self.before_wait: Callable[[], None] = _nothing
        self._defaults: dict[tuple[str, int], Queue] = {}
        self._fault: BaseException | None = None
        self._thread = threading.local()

    # Which process, device and stream a thread is in.

    @property
    def process(self) -> str:
        """The process that the calling thread plays."""
        return str(getattr(self._thread, "process", "main"))

    @contextmanager
    def in_process(self, name: str) -> Iterator[None]:
        """Play another process inside: other default streams, current device 0."""
        before = dict(self._thread.__dict__)
        self._thread.__dict__.clear()
        self._thread.process = name
        try:
            yield
        finally:
            self._thread.__dict__.clear()
            self._thread.__dict__.update(before)

    @property
    def current_device(self) -> int:
        """The calling thread's; 0 in a new thread."""
        return int(getattr(self._thread, "device", 0))

    @current_device.setter
    def current_device(self, device: int) -> None:
        if not 0 <= device < self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device} of {self.devices})")
        self._thread.device = device

    def current_queue(self, device: int) -> Queue:
        """The calling thread's stream of a device; the default stream unless it chose another."""
        self.touch(device)
        chosen: dict[int, Queue] = self._thread.__dict__.setdefault("queues", {})
        return chosen.get(device) or self.default_queue(device)

    def choose_queue(self, queue: Queue | None, device: int) -> Queue | None:
        """Make a stream the calling thread's; returns what was chosen before."""
        chosen: dict[int, Queue] = self._thread.__dict__.setdefault("queues", {})
        before = chosen.pop(device, None)
        if queue is not None:
            chosen[device] = queue
        return before

    def default_queue(self, device: int) -> Queue:
        """The default stream of a device: one for all threads of a process."""
        with self.lock:
            key = (self.process, device)
            if key not in self._defaults:
                self._defaults[key] = self.new_queue(device, is_default=True)
            return self._defaults[key]

    def new_queue(self, device: int, *, is_default: bool = False) -> Queue:
        """A further stream."""
        self.touch(device)
        with self.lock:
            queue = Queue(self.process, device, 0 if is_default else len(self.queues) + 1)
            self.queues.append(queue)
            return queue

    def touch(self, device: int) -> None:
        """The calling process does something on a device, so that it has a context there."""
        self.contexts.add((self.process, device))

    # Queueing.

    def launch(
        self,
        queue: Queue,
        label: str,
        run: Callable[[], None] | None = None,
        *,
        after: Point | None = None,
        gate: Gate | None = None,
    ) -> Point:
        """Queue a work; returns the point after it."""
        with self.lock:
            queue.waiting.append(Work(label, run, after, gate))
            point = queue.end
            self._run_ahead(point)
            self.lock.notify_all()
            return point

    def hold(self, queue: Queue, name: str) -> Gate:
        """Queue work that is not over before the gate is opened."""
        gate = Gate(name)
        self.launch(queue, name, gate=gate)
        return gate

    def open(self, gate: Gate) -> None:
        """Let a gate's work be over."""
        with self.lock:
            gate.was_opened = True
            self.lock.notify_all()

    # Waiting.

    def wait(self, points: Iterable[Point], kind: SyncKind) -> None:
        """Have the calling thread wait until all points are reached, as a synchronising call does."""
        points = list(points)
        self.before_wait()
        self.note(kind, points[0].queue.device if points else self.current_device)
        with self.lock:
            for point in points:
                self._disturb(point)
                self._reach(point, is_whole_device=kind == "device")
        self.raise_fault()

    def wait_for_device(self, device: int) -> None:
        """Wait for every stream of a device in this process, as a device-wide synchronise does."""
        with self.lock:
            ends = [queue.end for queue in self.queues if queue.device == device and queue.owner == self.process]
        self.wait(ends, "device")

    def note(self, kind: SyncKind, device: int) -> None:
        """Count a wait."""
        self.touch(device)
        self.syncs.append(Sync(kind, device, threading.current_thread().name, _call_site()))

    def drain(self) -> None:
        """Run all that can run, counting nothing."""
        self.before_wait()
        with self.lock:
            while self._sweep(self.queues):
                pass
        self.raise_fault()

    def poll(self, point: Point) -> bool:
        """Whether a point is reached, asked again and again until it is: time passes between two calls.

        Raises:
            Stuck: it will not be, for a gate is closed before it.
        """
        self.before_wait()
        with self.lock:
            if not point.reached and not self._sweep(self.queues):
                for queue in self.queues:
                    gate = queue.waiting[0].gate if queue.waiting else None
                    if gate is not None and not isinstance(gate, Spin) and self._behind(point, gate, set()):
                        raise Stuck(f"{point.queue} is polled, and with it {gate.name!r}, which is not over")
        self.raise_fault()
        return point.reached

    def depends(self, point: Point, gate: Gate) -> bool:
        """Whether a point is not reached before a gate is opened."""
        with self.lock:
            return self._behind(point, gate, set())

    def raise_fault(self) -> None:
        """Raise what went wrong in work that ran, once."""
        with self.lock:
            fault, self._fault = self._fault, None
        if fault is not None:
            raise DeviceFault(f"queued work failed: {fault}") from fault

    def _behind(self, point: Point, gate: Gate, seen: set[Point]) -> bool:
        if point in seen or point.reached:
            return False
        seen.add(point)
        works = list(point.queue.waiting)[: point.index - point.queue.done]
        return any(
            work.gate is gate or (work.after is not None and self._behind(work.after, gate, seen)) for work in works
        )

    def _draw(self, point: Point) -> Random:
        # By place, not by turn: what other threads do meanwhile changes nothing here.
        return Random(f"{self.seed}/{point.queue.device}/{point.queue.number}/{point.index}")

    def _run_ahead(self, point: Point) -> None:
        """A device may be faster than the host that queues."""
        if self.seed < len(PURE):
            return
        draw = self._draw(point)
        if draw.random() < 0.25:
            queues = list(self.queues)
            draw.shuffle(queues)
            for queue in queues[:2]:
                self._step(queue)

    def _disturb(self, point: Point) -> None:
        """Run what nobody waits for, as far as the order of this wait says."""
        draw = self._draw(point)
        order = PURE[self.seed] if self.seed < len(PURE) else draw.choice(PURE)
        others = [queue for queue in self.queues if queue is not point.queue]
        if order == "others":
            while self._sweep(others):
                pass
        elif order == "mixed":
            while not point.reached:
                queues = list(self.queues)
                draw.shuffle(queues)
                if not any(self._step(queue) for queue in queues):
                    return

    def _sweep(self, queues: Iterable[Queue]) -> bool:
        """Run one work of each queue that can; whether there was one."""
        return any(list(map(self._step, list(queues))))

    def _step(self, queue: Queue) -> bool:
        """Run the next work of a queue, if it can run now."""
        if not queue.waiting:
            return False
        work = queue.waiting[0]
        if (work.after is not None and not work.after.reached) or (work.gate is not None and not work.gate.is_open):
            return False
        queue.waiting.popleft()
        try:
            if work.run is not None:
                # The memory behind is the CPU's own: no mode and no subclass has a say.
                with torch._C._DisableTorchDispatch(), torch.no_grad():
                    work.run()
        except Exception as error:  # noqa: BLE001 - raised by the next wait, as a device's errors are
            self._fault = self._fault or error
        finally:
            queue.done += 1
            self.lock.notify_all()
        return True

    def _reach(self, point: Point, *, is_whole_device: bool) -> None:
        while not point.reached:
            work = point.queue.waiting[0]
            if work.after is not None and not work.after.reached:
                self._reach(work.after, is_whole_device=is_whole_device)
            elif work.gate is not None and not work.gate.is_open:
                if is_whole_device or not isinstance(work.gate, Spin):
                    raise Stuck(f"{point.queue} is waited for, and with it {work.gate.name!r}, which is not over")
                if not self._sweep(self.queues):
                    self.lock.wait(POLL_SECONDS)
            else:
                self._step(point.queue)


def _nothing() -> None:
    """Nobody else is to be asked."""


def _call_site() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in ("/cuda_sim/", "/torch/")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
