"""The two stages of the engine's work: forwards on one thread, what is made of them on another."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from eagle_target.devices import is_numbered, use_device
from eagle_target.errors import ContractError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from eagle_target.contract.runner import TargetForward

Item = TypeVar("Item")


class SecondStage(Generic[Item]):
    """Handles what the first stage gives, in order. One item waits at most; then the first stage does.

    Args:
        handle: for each item. abandon: for an item that `handle` left with what ends a thread, and that error.
        is_threaded: whether items are handled on a thread of their own, or where they are given.
        device: the thread's current one.
    """

    def __init__(
        self,
        handle: Callable[[Item], None],
        abandon: Callable[[Item, BaseException], None],
        *,
        is_threaded: bool,
        device: torch.device,
    ) -> None:
        self._handle = handle
        self._abandon = abandon
        self._waiting: list[Item] = []
        self._is_busy = False
        self._is_closing = False
        self._changed = threading.Condition()
        self._device = device
        self._thread: threading.Thread | None = None
        if is_threaded:
            self._thread = threading.Thread(target=self._run, name="eagle-target-projection", daemon=True)
            self._thread.start()

    def put(self, item: Item) -> None:
        """Have an item handled; waits while another one does."""
        if self._thread is None:
            self._handle(item)
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._waiting.append(item)
            self._changed.notify_all()

    def wait_until_idle(self) -> None:
        """Wait until everything given has been handled."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_busy)

    def close(self) -> None:
        """Handle what was given and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        use_device(self._device)
        while self._step():
            pass

    def _step(self) -> bool:
        """Handle the next item; keeps none alive while it waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            if not self._waiting:
                return False
            item = self._waiting.pop()
            self._is_busy = True
            self._changed.notify_all()
        try:
            self._handle(item)
        # Whatever it was, whoever waits for an answer gets one, and the first stage is not left waiting for this one.
        except BaseException as error:  # noqa: BLE001
            self._abandon(item, error)
        finally:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
        return True


class DeviceOrder:
    """Has what follows a forward run after it, and be over before its results leave; nothing to do on a CPU.

    Args:
        device: where forwards run.
        is_beside: whether what follows runs beside the next forward, on a stream of its own.

    Raises:
        ContractError: the device has no number.
    """

    def __init__(self, device: torch.device, *, is_beside: bool) -> None:
        if not is_numbered(device):
            raise ContractError(f"forwards run on {str(device)!r}, another device in each thread: name its number")
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        if self._on_cuda and is_beside:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def forwarded(self) -> torch.cuda.Event | None:
        """Mark the end of the forward that this thread has just queued."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def settle(self) -> None:
        """Wait for the copies that a failure left under way: the memory they go to is then given to others.

        What a broken device says is left out, for the failure is to be told.
        """
        if self._on_cuda:
            with suppress(RuntimeError):
                torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def following(self, forward: TargetForward | None, mark: torch.cuda.Event | None) -> Iterator[None]:
        """Work on a forward's tensors inside; copies to the CPU are complete afterwards."""
        if not self._on_cuda:
            yield
            return
        stream = self._stream or torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            if mark is not None:
                stream.wait_event(mark)
            if forward is not None and self._stream is not None:
                for tensor in (forward.aux_hidden_states, forward.last_hidden_states, forward.logits):
                    if tensor is not None:
                        # The allocator must not give the memory to the next forward before this stream is through.
                        tensor.record_stream(stream)
            try:
                yield
            except BaseException:
                self.settle()
                raise
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(stream)
            done.synchronize()


def engine_stopped() -> Unavailable:
    """What a request gets whose thread ended under it."""
    return Unavailable("the engine stopped on this request", status=503, problem="failed")
