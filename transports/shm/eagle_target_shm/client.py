"""The client's end: tensors in the server's memory, which the server uses again when the last of them is gone."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.devices import is_numbered
from eagle_target.errors import ConnectError, ProtocolError, TransferTimeout
from eagle_target.plugins.transport import ClientChannel
from eagle_target_shm.arena import MAX_LOANS
from eagle_target_shm.cuda import DeviceSegment, current_streams, find_device, map_segment, settle, wait_for
from eagle_target_shm.doorway import Invitation, enter, is_over, say
from eagle_target_shm.hosts import refusal, this_host
from eagle_target_shm.segment import Segment
from eagle_target_shm.tickets import CUDA, HOST, read_ticket, slot_of

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from eagle_target.contract.sinks import Sink
    from eagle_target.plugins.transport import ControlPlane, IncomingBody
    from eagle_target_shm.tickets import Place, Ticket


class Loan:
    """A transfer whose memory this process may read; given back when its last share is dropped.

    streams: those of devices that work on it. settled: whether they are known to be done with it.
    """

    def __init__(
        self, channel: ShmClientChannel, locks: Segment, kind: str, number: int, streams: set[torch.cuda.Stream]
    ) -> None:
        self._channel = channel
        self._locks = locks
        self._process = os.getpid()
        # The first share is whoever maps the tensors: nothing is given back before that is done.
        self._shares = 1
        self._dropped = itertools.count(1)
        self.kind = kind
        self.number = number
        self.streams = streams
        self.settled = kind == HOST

    def share(self, memory: Segment | DeviceSegment, place: Place) -> torch.Tensor:
        """A tensor that holds a share."""
        tensor = memory.tensor(place.offset, place.shape, place.dtype, self.drop)
        self._shares += 1
        return tensor

    def drop(self) -> None:
        """A share is gone. Called by finalizers: at any point of any thread."""
        # A forked child has copies of these tensors; they are not its own to give back.
        if next(self._dropped) == self._shares and os.getpid() == self._process:
            self._channel.give_back(self)
            self._locks.unlock(self.number)


class ShmClientChannel(ClientChannel):
    """Maps one server's memory for this client.

    Args:
        connection: to the server's doorway. memories: what is mapped. devices: those that work on received tensors.
    """

    def __init__(
        self,
        connection: socket.socket,
        memories: Mapping[str, Segment | DeviceSegment],
        locks: Segment,
        devices: tuple[torch.device, ...],
    ) -> None:
        self._connection = connection
        self._memories = dict(memories)
        self._locks: Segment | None = locks
        self._devices = devices
        self._lock = threading.Lock()
        self._latest = [-1] * (2 * MAX_LOANS)
        self._on_device: set[int] = set()
        self._closed = False

    @property
    def broken(self) -> bool:
        """Whether the server is gone, or has closed the channel."""
        return self._closed or is_over(self._connection)

    def receive(self, body: IncomingBody, sink: Sink) -> dict[str, str]:
        """Hand one transfer's tensors to the sink, where the server put them."""
        memories, locks = dict(self._memories), self._locks
        if self._closed or locks is None:
            raise ConnectError("this channel of transport 'shm' is closed: open another")
        ticket = read_ticket(body, {kind: memory.size for kind, memory in memories.items()})
        loans = self._take(ticket, locks)
        try:
            if ticket.event is not None and CUDA in loans:
                self._check_server()
                wait_for(memories[CUDA].device, ticket.event)
            tensors = {place.name: _tensor(place, loans, memories) for place in ticket.places}
            for name, tensor in tensors.items():
                sink.put(name, tensor)
            if CUDA in loans:
                self._settle(loans[CUDA])
        finally:
            # Else these names would hold the tensors for longer than the sink does.
            tensor, tensors = torch.empty(0), {}
            for loan in loans.values():
                loan.drop()
                loan.settled = loan.kind == HOST
        return ticket.metadata

    def give_back(self, loan: Loan) -> None:
        """Let the server use a transfer's memory again. Called by finalizers."""
        if not loan.settled:
            # Who keeps tensors of another process uses them where they were received, or where they are let go of, or
            # has those streams wait for others: nobody can be asked to record streams on memory that is not torch's.
            settle(loan.streams | current_streams(self._devices))
        say(self._connection, loan.number)
        if loan.kind == CUDA:
            self._on_device.discard(loan.number)
            self._leave()

    def close(self) -> None:
        """Receive no more. Tensors that were received stay valid."""
        self._closed = True
        self._leave()

    def _take(self, ticket: Ticket, locks: Segment) -> dict[str, Loan]:
        with self._lock:
            for number in ticket.loans.values():
                latest = self._latest[slot_of(number)]
                if latest == number:
                    raise ProtocolError(f"transfer {number} was received already")
                if latest > number:
                    raise _taken_back(number)
            for number in ticket.loans.values():
                self._latest[slot_of(number)] = number
        taken: dict[str, Loan] = {}
        for kind, number in ticket.loans.items():
            if not locks.lock(number):
                for loan in taken.values():
                    loan.drop()
                raise _taken_back(number)
            if kind == CUDA:
                self._on_device.add(number)
            streams = current_streams(self._devices) if kind == CUDA else set()
            taken[kind] = Loan(self, locks, kind, number, streams)
        return taken

    def _settle(self, loan: Loan) -> None:
        """Wait until the device has read what came, and see whether the server lived as long."""
        settle(loan.streams)
        loan.settled = True
        self._check_server()

    def _check_server(self) -> None:
        """A device's memory, unlike the host's, ends with the process that made it."""
        if is_over(self._connection):
            raise ConnectError("the server ended before its device's memory was read")

    def _leave(self) -> None:
        # The server frees a device's memory when this socket is closed: not before it is unmapped here.
        if self._closed and not self._on_device:
            self._memories.clear()
            self._locks = None
            self._connection.close()


def open_channel(offer: Mapping[str, Any], control: ControlPlane) -> ShmClientChannel:
    """Map the memory that a server of this host makes for this client.

    Raises:
        ConnectError: the server is not on this host, or of another user, or its memory cannot be mapped here.
    """
    reason = refusal(offer, "the server")
    if reason is not None:
        raise ConnectError(reason)
    hello = this_host()
    reader, target = torch.device(control.device), torch.device(control.target_device)
    if reader.type == target.type == "cuda":
        if not (is_numbered(reader) and is_numbered(target)):
            raise ConnectError(f"{reader} or {target} is another device in each thread: name its number")
        hello["target_device"] = control.target_device
    answer = control.open_channel(hello)
    with contextlib.ExitStack() as on_error:
        try:
            invitation = Invitation(bytes.fromhex(answer["name"]), bytes.fromhex(answer["key"]))
            connection, given = enter(str(offer["socket"]), invitation)
            on_error.callback(connection.close)
            try:
                segment = Segment.receive(given, int(answer[HOST]["bytes"]))
            finally:
                os.close(given)
            memories: dict[str, Segment | DeviceSegment] = {HOST: segment}
            devices: tuple[torch.device, ...] = ()
            if CUDA in answer:
                memories[CUDA] = _map_device(answer[CUDA], reader)
                devices = (reader, memories[CUDA].device)
            probe = bytes.fromhex(answer["probe"])
        except (KeyError, ValueError, TypeError) as error:
            raise ProtocolError(f"the server's answer describes no memory: {error!r}") from error
        for kind, memory in memories.items():
            if memory.read_probe() != probe:
                raise ConnectError(f"the {kind} memory that was mapped is not what the server wrote to")
        on_error.pop_all()
    return ShmClientChannel(connection, memories, segment, devices)


def _taken_back(number: int) -> TransferTimeout:
    return TransferTimeout(
        f"the server took transfer {number} back because it was not fetched in time: option take_timeout of transport "
        "'shm'"
    )


def _map_device(description: Mapping[str, Any], reader: torch.device) -> DeviceSegment:
    device = find_device(str(description["device"]), reader)
    return map_segment(device, int(description["bytes"]), bytes.fromhex(description["handle"]))


def _tensor(place: Place, loans: Mapping[str, Loan], memories: Mapping[str, Segment | DeviceSegment]) -> torch.Tensor:
    if not place.size:
        return torch.empty(place.shape, dtype=place.dtype)
    return loans[place.memory].share(memories[place.memory], place)
