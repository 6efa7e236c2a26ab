"""Process groups of two ranks, the server 0 and the client 1, that share nothing with any other group.

A transfer is its messages, then a tail from the server and an acknowledgement from the client. Both ends wait for
these two: gloo wakes who waits for a message that has not begun when a connection ends, and nobody who waits for one
that is half through.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from eagle_target.errors import ConnectError, ProtocolError, TransferTimeout, TransportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from eagle_target_nccl.rendezvous import Meeting

logger = logging.getLogger(__name__)

SERVER, CLIENT = 0, 1
# Numbers of transfers come round; there is one at a time in a group.
TRANSFER_NUMBERS = 1 << 20
TAGS = 4
DATA, TAIL, ACKNOWLEDGEMENT, ABORT = range(TAGS)
POLL_SECONDS = 0.0002
# NCCL's own watchdog is to leave timeouts to the deadlines of transfers.
FOR_EVER = timedelta(days=3650)
ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
CLEAN_UP_ONLY = "2"
_environment_lock = threading.Lock()


def backend_between(*devices: str) -> str:
    """The backend that joins devices: `nccl` where all are CUDA, else `gloo`."""
    return "nccl" if all(device.startswith("cuda") for device in devices) else "gloo"


class PairGroup(ABC):
    """One end of a group. One transfer at a time; `abort` from any thread.

    Args:
        group: torch's process group. rank: SERVER or CLIENT. device: where messages lie.
    """

    def __init__(self, group: Any, rank: int, device: torch.device) -> None:
        self._group: Any = group
        self._peer = 1 - rank
        self.device = device
        self._lock = threading.Lock()

    def push(self, messages: Sequence[torch.Tensor], number: int, length: int, deadline: float) -> None:
        """Send uint8 messages and wait until the client has them all.

        Args:
            number: of the transfer. length: bytes of all messages. deadline: `time.monotonic()` to be done by.

        Raises:
            TransferTimeout, ConnectError, ProtocolError: the group is of no use any more.
        """
        ours, theirs = self._mark(number, length), self._mark(0, 0)
        works: list[Any] = []
        try:
            works += [self._send(message, number, DATA) for message in messages]
            works.append(self._send(ours, number, TAIL))
            self._wait_all(self._receive(theirs, number, ACKNOWLEDGEMENT), works, deadline)
        except RuntimeError as error:
            raise self._error(number, deadline, error) from without_frames(error)
        finally:
            # They hold the connection, and whoever keeps the error keeps this frame.
            works.clear()
        self._compare(theirs, ours)

    def pull(self, messages: Sequence[torch.Tensor], number: int, length: int, deadline: float) -> None:
        """Fill uint8 messages, of the very sizes that are sent, and acknowledge them.

        Raises:
            TransferTimeout, ConnectError, ProtocolError: as `push`.
        """
        ours, theirs = self._mark(number, length), self._mark(0, 0)
        works: list[Any] = []
        try:
            works += [self._receive(message, number, DATA) for message in messages]
            self._wait_all(self._receive(theirs, number, TAIL), works, deadline)
            self._compare(theirs, ours)
            self._wait(self._send(ours, number, ACKNOWLEDGEMENT), deadline)
        except RuntimeError as error:
            raise self._error(number, deadline, error) from without_frames(error)
        finally:
            works.clear()

    def abort(self) -> None:
        """End whatever waits in the group, here and at the other end. Safe to call twice."""
        with self._lock:
            group, self._group = self._group, None
        if group is not None:
            self._abort(group)

    @abstractmethod
    def _abort(self, group: Any) -> None: ...

    @abstractmethod
    def _wait(self, work: Any, deadline: float) -> None: ...

    def _wait_all(self, last: Any, works: Sequence[Any], deadline: float) -> None:
        """Wait for what comes last, and then for the rest, which is over by then."""
        self._wait(last, deadline)
        for work in works:
            self._wait(work, deadline)

    def _send(self, message: torch.Tensor, number: int, kind: int) -> Any:
        return self._open_group().send([message], self._peer, _tag(number, kind))

    def _receive(self, message: torch.Tensor, number: int, kind: int) -> Any:
        return self._open_group().recv([message], self._peer, _tag(number, kind))

    def _open_group(self) -> Any:
        group = self._group
        if group is None:
            raise RuntimeError("the group is closed")
        return group

    def _mark(self, number: int, length: int) -> torch.Tensor:
        return torch.tensor([number, length], device=self.device)

    def _compare(self, theirs: torch.Tensor, ours: torch.Tensor) -> None:
        if theirs.tolist() != ours.tolist():
            raise ProtocolError(f"the other end is at transfer and length {theirs.tolist()}, this one {ours.tolist()}")

    def _error(self, number: int, deadline: float, error: RuntimeError) -> TransportError:
        """Ours for torch's."""
        if self._group is None:
            return ConnectError(f"transfer {number} was given up: the channel was closed")
        if time.monotonic() >= deadline:
            return TransferTimeout(f"transfer {number} was not over in time: {first_line(error)}")
        return ConnectError(f"transfer {number} broke: {first_line(error)}")


class GlooGroup(PairGroup):
    """Messages in CPU memory."""

    def __init__(self, meeting: Meeting, rank: int, address: str, timeout: float) -> None:
        # torch has no public name for them, and they alone say at which address to listen.
        options: Any = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
        options._devices = [distributed.ProcessGroupGloo.create_device(hostname=address)]  # noqa: SLF001
        options._threads = 1  # noqa: SLF001
        options._timeout = timedelta(seconds=timeout)  # noqa: SLF001
        group = distributed.ProcessGroupGloo(meeting.join(timeout), rank, 2, options)
        super().__init__(group, rank, torch.device("cpu"))

    def _wait(self, work: Any, deadline: float) -> None:
        work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))

    def _abort(self, group: Any) -> None:
        # Neither abort() nor shutdown() of a gloo group wakes anybody (torch 2.13). A wait that times out does: gloo
        # then closes the connection.
        with contextlib.suppress(RuntimeError):
            group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _tag(0, ABORT)).wait(timedelta(milliseconds=1))


class NcclGroup(PairGroup):
    """Messages in CUDA memory. Each thread's work goes to the stream that is current in it."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device, timeout: float) -> None:
        with torch.cuda.device(device), _errors_are_ours():
            options = distributed.ProcessGroupNCCL.Options()
            options.config.blocking = 0
            options._timeout = FOR_EVER  # noqa: SLF001
            group = distributed.ProcessGroupNCCL(meeting.join(timeout), rank, 2, options)
        super().__init__(group, rank, device)

    def _wait(self, work: Any, deadline: float) -> None:
        while not work.is_completed():
            if self._group is None or time.monotonic() >= deadline:
                raise RuntimeError("NCCL was not done")
            time.sleep(POLL_SECONDS)
        work.wait()

    def _abort(self, group: Any) -> None:
        with contextlib.suppress(RuntimeError):
            group.abort()


def open_group(
    meeting: Meeting, rank: int, *, backend: str, address: str, device: str, connect_timeout: float
) -> PairGroup:
    """Join a group and see that something gets through it.

    Args:
        address: of this end, for gloo. device: of this end, for NCCL.

    Raises:
        TransportError: the other end did not come, or nothing gets through.
    """
    deadline = time.monotonic() + connect_timeout
    group: PairGroup
    try:
        if backend == "nccl":
            group = NcclGroup(meeting, rank, torch.device(device), connect_timeout)
        else:
            group = GlooGroup(meeting, rank, address, connect_timeout)
    except RuntimeError as error:
        raise ConnectError(
            f"no group over {meeting.host}:{meeting.port}: {first_line(error)}: are the ports between the two "
            "machines open, and do both have the same torch?"
        ) from without_frames(error)
    try:
        greet = group.push if rank == SERVER else group.pull
        greet([], 0, 0, deadline)
    except BaseException:
        group.abort()
        raise
    return group


@contextlib.contextmanager
def _errors_are_ours() -> Iterator[None]:
    """Keep a new NCCL group from ending the process when its peer dies; only this variable tells it not to."""
    with _environment_lock:
        before = os.environ.get(ERROR_HANDLING)
        os.environ[ERROR_HANDLING] = CLEAN_UP_ONLY
        try:
            yield
        finally:
            if before is None:
                del os.environ[ERROR_HANDLING]
            else:
                os.environ[ERROR_HANDLING] = before


def _tag(number: int, kind: int) -> int:
    return number % TRANSFER_NUMBERS * TAGS + kind


def without_frames(error: RuntimeError) -> RuntimeError:
    """An error to chain to. Its frames hold torch's objects, and whoever keeps the error would keep connections."""
    return error.with_traceback(None)


def first_line(error: BaseException) -> str:
    """The first line of torch's long messages."""
    return str(error).partition("\n")[0][:300] or type(error).__name__
