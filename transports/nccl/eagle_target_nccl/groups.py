"""Groups of two, the server 0 and the client 1, that share nothing with any other group.

Before anything else both ends prove to each other that they have the group's key. A transfer is its messages, then a
seal from the server and one from the client: each says which transfer it was and, on the CPU, what bytes. Both ends
wait for these two.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from eagle_target.errors import ConnectError, ProtocolError, TransferTimeout, TransportError
from eagle_target.seals import NONCE_BYTES, SEAL_BYTES, is_seal, new_nonce

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from eagle_target_nccl.proofs import Seals, Transfer

logger = logging.getLogger(__name__)

SERVER, CLIENT = 0, 1
# At a time between memory and socket, so that it is digested while it is in the processor's cache.
PIECE_BYTES = 1 << 20
SHORTEST_SECONDS = 0.001
POLL_SECONDS = 0.0002
# NCCL's own watchdog is to leave timeouts to the deadlines of transfers.
FOR_EVER = timedelta(days=3650)
ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
CLEAN_UP_ONLY = "2"
# Under which torch's ranks 0 and 1 leave NCCL's id for each other (torch 2.6 to 2.13).
UNIQUE_ID_KEY = "0:1"
UNIQUE_ID_BYTES = 128
_environment_lock = threading.Lock()


def backend_between(*devices: str) -> str:
    """What joins devices: `nccl` where all are CUDA, else `tcp`."""
    return "nccl" if all(device.startswith("cuda") for device in devices) else "tcp"


class PairGroup(ABC):
    """One end of a group. One transfer at a time; `abort` from any thread.

    Args:
        rank: SERVER or CLIENT. device: where messages lie. seals: made with the group's key.
    """

    def __init__(self, rank: int, device: torch.device, seals: Seals) -> None:
        self.rank = rank
        self.device = device
        self._seals = seals
        self._content = seals.new_hash()

    def prove(self, deadline: float) -> None:
        """Show the other end that this one has the key, and see that the other has it.

        Raises:
            ProtocolError: it has not. TransferTimeout, ConnectError: nothing gets through.
        """
        try:
            with self._using():
                if self.rank == SERVER:
                    self._prove_server(deadline)
                else:
                    self._prove_client(deadline)
        except (OSError, RuntimeError) as error:
            raise self._error("the proof of the two ends", deadline, error) from without_frames(error)

    def push(self, messages: Sequence[torch.Tensor], transfer: Transfer, deadline: float) -> None:
        """Send uint8 messages and wait until the client has them all.

        Args:
            deadline: `time.monotonic()` to be done by.

        Raises:
            TransferTimeout, ConnectError, ProtocolError: the group is of no use any more.
        """
        works: list[Any] = []
        self._content = self._seals.new_hash()
        try:
            with self._using():
                works += [self._send(message, deadline) for message in messages]
                content = self._content.digest()
                works.append(self._send(self._message(self._seals.of_transfer(SERVER, transfer, content)), deadline))
                theirs = self._receive_bytes(SEAL_BYTES, deadline)
                for work in works:
                    self._wait(work, deadline)
        except (OSError, RuntimeError) as error:
            raise self._error(f"transfer {transfer.number}", deadline, error) from without_frames(error)
        finally:
            # They hold the connection, and whoever keeps the error keeps this frame.
            works.clear()
        self._check_transfer(theirs, self._seals.of_transfer(CLIENT, transfer, content), transfer)

    def pull(self, messages: Sequence[torch.Tensor], transfer: Transfer, deadline: float) -> None:
        """Fill uint8 messages, of the very sizes that are sent, see that they are what was sent, and say so.

        Raises:
            TransferTimeout, ConnectError, ProtocolError: as `push`.
        """
        works: list[Any] = []
        self._content = self._seals.new_hash()
        try:
            with self._using():
                works += [self._receive(message, deadline) for message in messages]
                content = self._content.digest()
                theirs = self._receive_bytes(SEAL_BYTES, deadline)
                for work in works:
                    self._wait(work, deadline)
                self._check_transfer(theirs, self._seals.of_transfer(SERVER, transfer, content), transfer)
                self._send_bytes(self._seals.of_transfer(CLIENT, transfer, content), deadline)
        except (OSError, RuntimeError) as error:
            raise self._error(f"transfer {transfer.number}", deadline, error) from without_frames(error)
        finally:
            works.clear()

    @abstractmethod
    def abort(self) -> None:
        """End whatever waits in the group, here and at the other end. Safe to call twice."""

    @property
    @abstractmethod
    def _is_aborted(self) -> bool: ...

    def _using(self) -> contextlib.AbstractContextManager[None]:
        """The group is in use inside."""
        return contextlib.nullcontext()

    @abstractmethod
    def _send(self, message: torch.Tensor, deadline: float) -> Any:
        """Start to send; what it returns is waited for."""

    @abstractmethod
    def _receive(self, message: torch.Tensor, deadline: float) -> Any:
        """Start to receive; what it returns is waited for."""

    @abstractmethod
    def _wait(self, work: Any, deadline: float) -> None: ...

    def _prove_server(self, deadline: float) -> None:
        ours = new_nonce()
        self._send_bytes(ours, deadline)
        answer = self._receive_bytes(NONCE_BYTES + SEAL_BYTES, deadline)
        self._seals.meet(ours, answer[:NONCE_BYTES])
        self._check_end(answer[NONCE_BYTES:])
        self._send_bytes(self._seals.of_end(SERVER), deadline)

    def _prove_client(self, deadline: float) -> None:
        theirs, ours = self._receive_bytes(NONCE_BYTES, deadline), new_nonce()
        self._seals.meet(theirs, ours)
        self._send_bytes(ours + self._seals.of_end(CLIENT), deadline)
        self._check_end(self._receive_bytes(SEAL_BYTES, deadline))

    def _message(self, data: bytes) -> torch.Tensor:
        return torch.tensor(list(data), dtype=torch.uint8, device=self.device)

    def _send_bytes(self, data: bytes, deadline: float) -> None:
        self._wait(self._send(self._message(data), deadline), deadline)

    def _receive_bytes(self, size: int, deadline: float) -> bytes:
        message = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._wait(self._receive(message, deadline), deadline)
        return bytes(message.tolist())

    def _check_end(self, theirs: bytes) -> None:
        if not is_seal(theirs, self._seals.of_end(1 - self.rank)):
            raise ProtocolError("the other end of the group has not the key that was given over HTTP: it is not ours")

    def _check_transfer(self, theirs: bytes, expected: bytes, transfer: Transfer) -> None:
        if not is_seal(theirs, expected):
            raise ProtocolError(
                f"what came is not transfer {transfer.number} of {transfer.length} bytes: the two ends are at "
                "different transfers, or its bytes were changed on the way"
            )

    def _error(self, what: str, deadline: float, error: Exception) -> TransportError:
        """Ours for a library's."""
        if self._is_aborted:
            return ConnectError(f"{what} was given up: the channel was closed")
        if time.monotonic() >= deadline:
            return TransferTimeout(f"{what} was not over in time: {first_line(error)}")
        return ConnectError(f"{what} broke: {first_line(error)}")


class TcpGroup(PairGroup):
    """Messages in CPU memory, over a connection that is the group's alone.

    Args:
        connection: owned by the group from now on.
    """

    def __init__(self, connection: socket.socket, rank: int, seals: Seals) -> None:
        super().__init__(rank, torch.device("cpu"), seals)
        self._connection = connection
        self._over = threading.Event()
        # Held while the socket is in use: it is not closed under who uses it, or another's might get its number.
        self._in_use = threading.RLock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def abort(self) -> None:
        """Close the connection; who waits on it wakes, and then it is gone."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._in_use.acquire(blocking=False):
            try:
                self._connection.close()
            finally:
                self._in_use.release()

    @property
    def _is_aborted(self) -> bool:
        return self._over.is_set()

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        with self._in_use:
            try:
                yield
            finally:
                if self._over.is_set():
                    self._connection.close()

    def _send(self, message: torch.Tensor, deadline: float) -> None:
        left = _memory_of(message)
        while left:
            piece, left = left[:PIECE_BYTES], left[PIECE_BYTES:]
            self._content.update(piece)
            self._connection.settimeout(max(deadline - time.monotonic(), SHORTEST_SECONDS))
            self._connection.sendall(piece)

    def _receive(self, message: torch.Tensor, deadline: float) -> None:
        left = _memory_of(message)
        while left:
            self._connection.settimeout(max(deadline - time.monotonic(), SHORTEST_SECONDS))
            count = self._read(left[:PIECE_BYTES])
            self._content.update(left[:count])
            left = left[count:]

    def _read(self, piece: memoryview) -> int:
        count = self._connection.recv_into(piece)
        if not count:
            raise ConnectionError("the other end closed the connection")
        return count

    def _wait(self, work: Any, deadline: float) -> None:
        """It is over already."""


class NcclGroup(PairGroup):
    """Messages in CUDA memory. Each thread's work goes to the stream that is current in it.

    NCCL's id, a secret in itself, comes and goes over HTTP: the store it passes through is this process's own.

    Args:
        store: one of torch's, for this end alone.
    """

    def __init__(self, store: Any, rank: int, device: torch.device, seals: Seals) -> None:
        super().__init__(rank, device, seals)
        with torch.cuda.device(device), _errors_are_ours():
            options = distributed.ProcessGroupNCCL.Options()
            options.config.blocking = 0
            options._timeout = FOR_EVER  # noqa: SLF001
            self._group: Any = distributed.ProcessGroupNCCL(store, rank, 2, options)
        self._lock = threading.Lock()

    def abort(self) -> None:
        """End what waits, on the device too."""
        with self._lock:
            group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()

    @property
    def _is_aborted(self) -> bool:
        return self._group is None

    def _send(self, message: torch.Tensor, deadline: float) -> Any:  # noqa: ARG002
        return self._open_group().send([message], 1 - self.rank, 0)

    def _receive(self, message: torch.Tensor, deadline: float) -> Any:  # noqa: ARG002
        return self._open_group().recv([message], 1 - self.rank, 0)

    def _open_group(self) -> Any:
        group = self._group
        if group is None:
            raise RuntimeError("the group is closed")
        return group

    def _wait(self, work: Any, deadline: float) -> None:
        while not work.is_completed():
            if self._group is None or time.monotonic() >= deadline:
                raise RuntimeError("NCCL was not done")
            time.sleep(POLL_SECONDS)
        work.wait()


def new_store() -> Any:
    """A store in this process's memory, for one group's NCCL to find its id in."""
    return distributed.HashStore()  # type: ignore[attr-defined]


def read_unique_id(store: Any, timeout: float) -> bytes:
    """NCCL's id, which the server's end has left in its store.

    Raises:
        ConnectError: it has not, in time.
    """
    try:
        store.wait([UNIQUE_ID_KEY], timedelta(seconds=timeout))
    except RuntimeError as error:
        raise ConnectError(f"NCCL did not start within {timeout:g} s: {first_line(error)}") from without_frames(error)
    return bytes(store.get(UNIQUE_ID_KEY))


def store_with(unique_id: bytes) -> Any:
    """A store in which the client's end finds the id that the server told over HTTP."""
    if len(unique_id) != UNIQUE_ID_BYTES:
        raise ConnectError(f"the server told an id of {len(unique_id)} bytes, NCCL's have {UNIQUE_ID_BYTES}")
    store = new_store()
    store.set(UNIQUE_ID_KEY, unique_id)
    return store


def proven(group: PairGroup, deadline: float) -> PairGroup:
    """A group whose other end has proven itself; one that has not is aborted.

    Raises:
        TransportError: it has not.
    """
    try:
        group.prove(deadline)
    except BaseException:
        group.abort()
        raise
    return group


def _memory_of(message: torch.Tensor) -> memoryview:
    array: Any = message.numpy()
    return memoryview(array)


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


def without_frames(error: Exception) -> Exception:
    """An error to chain to. Its frames hold torch's objects, and whoever keeps the error would keep connections."""
    return error.with_traceback(None)


def first_line(error: BaseException) -> str:
    """The first line of torch's long messages."""
    return str(error).partition("\n")[0][:300] or type(error).__name__
