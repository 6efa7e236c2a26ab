"""The server's end: answers made in memory that a client of the same host maps."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.errors import ConnectError, ProtocolError, TransferTimeout
from eagle_target.plugins.transport import Reply, ServerChannel, ServerEndpoint
from eagle_target_shm.arena import Arena
from eagle_target_shm.cuda import DeviceSegment, SegmentPool, device_name, mark
from eagle_target_shm.doorway import MESSAGE_BYTES, Doorway, hand_over
from eagle_target_shm.extents import LARGE_ALIGNMENT, padded
from eagle_target_shm.hosts import refusal, this_host
from eagle_target_shm.memory import SharedMemory, SharedTensors
from eagle_target_shm.segment import PROBE_BYTES, Segment
from eagle_target_shm.tickets import CONTENT_TYPE, CUDA, FIRST_CUDA_NUMBER, HOST, Place, Ticket, check_sendable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from eagle_target.contract.sinks import PackedTensors
    from eagle_target_shm.arena import Loan
    from eagle_target_shm.doorway import Invitation
    from eagle_target_shm.options import ShmOptions

    Lent = dict[str, tuple[Loan, dict[str, int]]]

# Sends to full channels that may wait at a time, of all clients: the server needs threads for the others, too.
MAX_WAITING = 24
# Before the first block: the probe, and what aligns the blocks.
HEAD_BYTES = LARGE_ALIGNMENT


class ShmServerEndpoint(ServerEndpoint):
    """Makes memory for each client of this host and user, and a doorway through which they get it."""

    def __init__(self, options: ShmOptions) -> None:
        self.options = options
        self.waiting = threading.BoundedSemaphore(MAX_WAITING)
        self.segments = SegmentPool()
        self._doorway = Doorway()
        self._lock = threading.Lock()
        self._reserved = 0

    @property
    def reserved_bytes(self) -> int:
        """Of shared memory, promised to clients."""
        return self._reserved

    def offer(self) -> dict[str, Any]:
        """Which host this is, and where the doorway is."""
        return {**this_host(), "socket": self._doorway.name}

    def accept(self, hello: Mapping[str, Any], *, reached_at: str) -> tuple[ServerChannel, dict[str, Any]]:  # noqa: ARG002
        """Make memory for a client of this host; it is mapped once the client has come through the doorway."""
        reason = refusal(hello, "the client")
        if reason is not None:
            raise ConnectError(reason)
        self._reserve(self.options.max_bytes)
        try:
            channel = ShmServerChannel(self, _cuda_device(hello))
        except BaseException:
            self._release()
            raise
        invitation = self._doorway.expect(channel)
        channel.on_end = lambda: self._forget(invitation)
        return channel, {"name": invitation.name.hex(), "key": invitation.key.hex(), **channel.describe()}

    def close(self) -> None:
        """Send every client away."""
        self._doorway.close()
        self.segments.close()

    def _reserve(self, size: int) -> None:
        with self._lock:
            if self._reserved + size > self.options.max_total_bytes:
                raise ConnectError(
                    f"{self._reserved} bytes of shared memory are promised to clients, {size} more would pass option "
                    f"max_total_bytes, {self.options.max_total_bytes}: raise it, or lower max_bytes"
                )
            self._reserved += size

    def _release(self) -> None:
        with self._lock:
            self._reserved -= self.options.max_bytes

    def _forget(self, invitation: Invitation) -> None:
        self._doorway.forget(invitation)
        self._release()


class ShmServerChannel(ServerChannel):
    """One client's memory. on_end: called once, when the client is gone or sent away."""

    def __init__(self, endpoint: ShmServerEndpoint, device: torch.device | None) -> None:
        options = endpoint.options
        self._endpoint = endpoint
        self._probe = secrets.token_bytes(PROBE_BYTES)
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._closed = self._ended = False
        self.on_end: Callable[[], None] = _nothing
        segment = Segment.create(HEAD_BYTES + padded(options.max_bytes))
        self._segment: Segment | None = segment
        self._device: DeviceSegment | None = None
        if device is not None:
            self._device = endpoint.segments.take(device, HEAD_BYTES + padded(options.cuda_bytes))
        self._memories = {HOST: self._memory(segment, segment, "max_bytes", 0)}
        if self._device is not None:
            self._memories[CUDA] = self._memory(self._device, segment, "cuda_bytes", FIRST_CUDA_NUMBER)
        self._arenas = {kind: memory.arena for kind, memory in self._memories.items()}

    @property
    def used_bytes(self) -> int:
        """Of answers that are being made, or that the client has not let go of; none when it is gone."""
        return sum(arena.used_bytes for arena in [*self._arenas.values()])

    def describe(self) -> dict[str, Any]:
        """What the client maps."""
        description: dict[str, Any] = {"probe": self._probe.hex()}
        for kind, memory in self._memories.items():
            memory.backing.write_probe(self._probe)
            description[kind] = {"bytes": memory.backing.size}
        if self._device is not None:
            description[CUDA] |= {"device": device_name(self._device.device), "handle": self._device.handle.hex()}
        return description

    def new_tensors(self) -> PackedTensors:
        """Shared memory, while the channel is open."""
        memories = self._memories
        memory = memories.get(CUDA) or memories.get(HOST)
        return super().new_tensors() if memory is None else SharedTensors(memory)

    def send(self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Reply:
        """Lend the tensors to the client; waits for room where there is none."""
        check_sendable(tensors)
        lent = self._lend(tensors, 0.0)
        if lent is None:
            if isinstance(tensors, SharedTensors):
                tensors.step_out()
            lent = self._lend_in_time(transfer_id, tensors)
        try:
            event = self._mark(tensors, lent)
            places = [_place(name, tensor, lent) for name, tensor in tensors.items()]
            numbers = {kind: loan.number for kind, (loan, _) in lent.items()}
            body = Ticket(places, numbers, dict(metadata), event).encode()
        except BaseException:
            self._take_back(lent)
            raise
        now = time.monotonic()
        for loan, _ in lent.values():
            loan.lent_at = now
        return Reply(CONTENT_TYPE, [body], sum(place.size for place in places))

    def enter(self, connection: socket.socket) -> None:
        """Hand the memory over to the client, which is here."""
        with self._lock:
            segment, self._connection = self._segment, connection
        if segment is None:
            raise ConnectError("the channel was closed before its client came")
        hand_over(connection, [segment.descriptor])

    def hear(self, message: bytes) -> None:
        """The client has let go of a transfer."""
        if len(message) != MESSAGE_BYTES:
            raise ProtocolError(f"a client sent {message!r} where the number of a transfer is expected")
        number = int.from_bytes(message, "little")
        arena = self._arenas.get(CUDA if number >= FIRST_CUDA_NUMBER else HOST)
        if arena is not None:
            arena.release(number)

    def leave(self) -> None:
        """The client is gone: nobody needs the memory any more."""
        self._end()

    def close(self) -> None:
        """Send the client away; what it has mapped stays valid. A device's memory is kept until it has gone."""
        with self._lock:
            closed, self._closed = self._closed, True
            connection = self._connection
        for arena in [*self._arenas.values()]:
            arena.close()
        if connection is None:
            self._end()
        elif not closed:
            # Gone already, or about to be: the doorway hears of it.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR if self._device is None else socket.SHUT_WR)

    def _end(self) -> None:
        for arena in [*self._arenas.values()]:
            arena.close()
        with self._lock:
            ended, self._ended = self._ended, True
            self._closed = True
            self._memories, self._arenas, self._segment, self._device = {}, {}, None, None
        if not ended:
            self.on_end()

    def _memory(self, backing: Segment | DeviceSegment, locks: Segment, option: str, first_number: int) -> SharedMemory:
        take_timeout = self._endpoint.options.take_timeout
        arena = Arena(HEAD_BYTES, backing.size, locks=locks, take_timeout=take_timeout, first_number=first_number)
        return SharedMemory(backing, arena, option)

    def _lend_in_time(self, transfer_id: str, tensors: Mapping[str, torch.Tensor]) -> Lent:
        timeout = self._endpoint.options.send_timeout
        if not self._endpoint.waiting.acquire(blocking=False):
            raise TransferTimeout(
                f"transfer {transfer_id}: the client's shared memory is full and {MAX_WAITING} transfers wait for "
                "theirs already: let go of batches sooner, or raise option max_bytes of transport 'shm'"
            )
        try:
            lent = self._lend(tensors, timeout)
        finally:
            self._endpoint.waiting.release()
        if lent is None:
            bounds = {kind: arena.capacity for kind, arena in self._arenas.items()}
            raise TransferTimeout(
                f"transfer {transfer_id}: the client gave back too little of its shared memory ({bounds} bytes) within "
                f"{timeout:g} s: let go of batches sooner, prefetch fewer, or raise option max_bytes (cuda_bytes for a "
                "device's) of transport 'shm' on the server"
            )
        return lent

    def _lend(self, tensors: Mapping[str, torch.Tensor], timeout: float) -> Lent | None:
        memories = self._memories
        if self._closed or not memories:
            raise ConnectError("the channel is closed: open another")
        if self._connection is None:
            raise ConnectError("the client has not mapped the channel's memory yet")
        deadline = time.monotonic() + timeout
        lent: Lent = {}
        try:
            for kind, memory in memories.items():
                part = {name: tensor for name, tensor in tensors.items() if _kind(tensor, memories) == kind}
                if part:
                    loan = memory.lend(part, max(deadline - time.monotonic(), 0.0))
                    if loan is None:
                        self._take_back(lent)
                        return None
                    lent[kind] = loan
        except BaseException:
            self._take_back(lent)
            raise
        return lent

    def _take_back(self, lent: Lent) -> None:
        for kind, (loan, _) in lent.items():
            arena = self._arenas.get(kind)
            if arena is not None:
                arena.release(loan.number)

    def _mark(self, tensors: Mapping[str, torch.Tensor], lent: Lent) -> bytes | None:
        device = self._device
        if CUDA not in lent or device is None:
            return None
        event, handle = mark(device.device, tensors.streams if isinstance(tensors, SharedTensors) else ())
        # As long as the client may wait for it.
        lent[CUDA][0].keep.append(event)
        return handle


def _kind(tensor: torch.Tensor, memories: Mapping[str, SharedMemory]) -> str | None:
    """The memory a tensor is sent in; None for an empty one."""
    if not tensor.nbytes:
        return None
    device = memories[CUDA].backing.device if CUDA in memories else None
    return CUDA if tensor.device == device else HOST


def _place(name: str, tensor: torch.Tensor, lent: Lent) -> Place:
    for kind, (_, offsets) in lent.items():
        if name in offsets:
            return Place(name, tensor.dtype, tuple(tensor.shape), kind, offsets[name])
    return Place(name, tensor.dtype, tuple(tensor.shape), HOST, 0)


def _cuda_device(hello: Mapping[str, Any]) -> torch.device | None:
    """The device whose memory a client wants to read, if this process has anything there.

    An engine in a process of its own hands its tensors over on the CPU: then this process uses no device.
    """
    wanted = str(hello.get("target_device", ""))
    if not wanted.startswith("cuda") or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConnectError(f"the client names the target's device {wanted[:64]!r}, which is none") from error
    if device.index is None or device.index >= torch.cuda.device_count():
        raise ConnectError(f"the client names {device}, the server's are numbered to {torch.cuda.device_count() - 1}")
    return device


def _nothing() -> None:
    """Nobody waits for the end."""
