"""The client's end: asks for a transfer, and receives it into the memory it goes to."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.devices import is_numbered
from eagle_target.errors import ConnectError, EagleTargetError, ProtocolError, TransferTimeout, TransportError
from eagle_target.plugins.transport import ClientChannel
from eagle_target.seals import KEY_BYTES
from eagle_target_nccl import interfaces
from eagle_target_nccl.endpoint import backends, device_identity
from eagle_target_nccl.gate import NAME_BYTES
from eagle_target_nccl.groups import CLIENT, NcclGroup, TcpGroup, backend_between, proven, store_with
from eagle_target_nccl.layout import (
    CONTENT_TYPE,
    MAX_TICKET_BYTES,
    Staging,
    as_bytes,
    decode_ticket,
    group_sizes,
)
from eagle_target_nccl.proofs import Seals, Transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from eagle_target.contract.sinks import Sink
    from eagle_target.plugins.transport import ControlPlane, IncomingBody
    from eagle_target_nccl.groups import PairGroup
    from eagle_target_nccl.layout import Ticket
    from eagle_target_nccl.options import NcclOptions
    from eagle_target_nccl.proofs import Digest

logger = logging.getLogger(__name__)

REASON_SECONDS = 1.0
SHORTEST_SECONDS = 0.001


def open_client_channel(options: NcclOptions, offer: Mapping[str, Any], control: ControlPlane) -> ClientChannel:
    """Join a group with one server.

    Raises:
        ConnectError: the two ends cannot, with the reason.
    """
    backend = backend_between(control.device, control.target_device)
    for device in (control.device, control.target_device):
        if backend == "nccl" and not is_numbered(torch.device(device)):
            raise ConnectError(f"NCCL joins two devices, and {device!r} is another in each thread: name its number")
    for end, usable in (("this end", backends()), ("the server", offer.get("backends") or [])):
        if backend not in usable:
            raise ConnectError(f"{end} cannot use {backend!r} between {control.target_device} and {control.device}")
    digest: Digest = "sha256" if control.is_private else "xxh3_128"
    hello = {"backend": backend, "target_device": control.target_device, "digest": digest, "gpu": None}
    if backend == "nccl":
        reason = interfaces.refusal(_address_towards(control.address), "this end")
        if reason is not None:
            raise ConnectError(reason)
        hello["gpu"] = device_identity(control.device)
    control.open_channel(hello)

    def open_this_end(timeout: float) -> PairGroup:
        return _join(offer, control, backend, digest, timeout)

    return NcclClientChannel(open_this_end, control, options.connect_timeout)


class NcclClientChannel(ClientChannel):
    """Receives one transfer at a time; who else wants one waits, no longer than its own deadline.

    Args:
        open_this_end: joins a group within so many seconds. control: to the server's end.
        connect_timeout: seconds a group may take to come up.
    """

    def __init__(
        self, open_this_end: Callable[[float], PairGroup], control: ControlPlane, connect_timeout: float
    ) -> None:
        self._open_this_end = open_this_end
        self._control = control
        self._connect_timeout = connect_timeout
        self._turn = threading.Lock()
        self._number = 0
        self._staging = Staging(torch.device("cpu"))
        self._failure: str | None = None
        self._group = open_this_end(connect_timeout)

    @property
    def broken(self) -> bool:
        """Whether the channel is of no use any more."""
        return self._failure is not None

    def receive(self, body: IncomingBody, sink: Sink) -> dict[str, str]:
        """Receive one transfer.

        Raises:
            ProtocolError: the body is no ticket, or the server has no such transfer any more.
            TransferTimeout: the deadline passed. ConnectError: the group broke.
        """
        ticket = _read_ticket(body)
        if ticket.failure is not None:
            self._break(f"the server gave the channel up: {ticket.failure}")
        self._check_open()
        with ExitStack() as turn:
            if not self._turn.acquire(timeout=max(body.deadline - time.monotonic(), 0.0)):
                raise TransferTimeout("the deadline passed while another transfer of the channel was received")
            turn.callback(self._turn.release)
            self._check_open()
            if self._group.device.type == "cpu":
                self._to_memory(ticket, sink, body.deadline)
            else:
                self._to_device(ticket, sink, body.deadline)
        return ticket.header.metadata

    def close(self) -> None:
        """End the group, and with it what is being received."""
        self._break("this channel of transport 'nccl' is closed: open another")

    def _to_memory(self, ticket: Ticket, sink: Sink, deadline: float) -> None:
        """Receive large runs of rows where they go, and small ones together, to be copied there."""
        views = [
            as_bytes(_checked(view))
            for spec in ticket.header.specs
            for view in sink.allocate(spec.name, spec.shape, spec.dtype).views()
        ]
        groups = group_sizes([len(view) for view in views])
        shared = [group for group in groups if len(group) > 1]
        staged = self._staging.take([sum(len(views[index]) for index in group) for group in shared])
        waiting = iter(staged)
        messages = [views[group.start] if len(group) == 1 else next(waiting) for group in groups]
        self._pull(ticket, messages, deadline)
        for group, message in zip(shared, staged, strict=True):
            parts = message.split_with_sizes([len(views[index]) for index in group])
            for index, part in zip(group, parts, strict=True):
                views[index].copy_(part)

    def _to_device(self, ticket: Ticket, sink: Sink, deadline: float) -> None:
        """Receive into one piece of memory, of which the tensors are views. torch keeps such memory for the next."""
        specs = ticket.header.specs
        with torch.cuda.device(self._group.device):
            flat = torch.empty(ticket.header.data_bytes, dtype=torch.uint8, device=self._group.device)
            groups = group_sizes([spec.end - spec.start for spec in specs])
            messages = [flat[specs[group.start].start : specs[group.stop - 1].end] for group in groups]
            self._pull(ticket, messages, deadline)
            for spec in specs:
                sink.put(spec.name, flat[spec.start : spec.end].view(spec.dtype).view(spec.shape))

    def _pull(self, ticket: Ticket, messages: Sequence[torch.Tensor], deadline: float) -> None:
        """Have the server send a transfer, and receive it.

        From the moment of asking the two ends agree on what is under way or the group is given up.
        """
        self._number += 1
        transfer = Transfer(ticket.transfer_id, self._number, ticket.header.data_bytes)
        request = {"pull": transfer.name, "number": transfer.number, "cuts": [len(message) for message in messages]}
        try:
            answer = self._ask(request, deadline)
            if answer.get("left"):
                self._rejoin(deadline)
                answer = self._ask(request, deadline)
            if not answer.get("gone"):
                self._group.pull(messages, transfer, deadline)
                return
        except BaseException as error:
            self._break(str(error) or type(error).__name__)
            raise
        raise ProtocolError(
            f"the server has no transfer {ticket.transfer_id!r}: it was taken, or not asked for in time"
        )

    def _ask(self, request: Mapping[str, Any], deadline: float) -> Mapping[str, Any]:
        answer = self._control.tell(request, timeout=max(deadline - time.monotonic(), SHORTEST_SECONDS))
        if answer.get("failure") is not None:
            raise ConnectError(f"the server gave the channel up: {answer['failure']}")
        return answer

    def _rejoin(self, deadline: float) -> None:
        """Join another group: the server left the last one when nothing was sent for long."""
        self._group.abort()
        self._group = self._open_this_end(
            min(self._connect_timeout, max(deadline - time.monotonic(), SHORTEST_SECONDS))
        )
        if self._failure is not None:
            self._group.abort()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise ConnectError(self._failure)

    def _break(self, reason: str) -> None:
        if self._failure is None:
            self._failure = reason
        self._group.abort()


def _read_ticket(body: IncomingBody) -> Ticket:
    if body.content_type != CONTENT_TYPE or not 0 < body.length <= MAX_TICKET_BYTES:
        raise ProtocolError(f"the answer is {body.content_type!r} of {body.length} bytes, expected {CONTENT_TYPE!r}")
    data = bytearray(body.length)
    body.readinto(memoryview(data))
    return decode_ticket(body.content_type, bytes(data))


def _checked(view: torch.Tensor) -> torch.Tensor:
    if view.device.type != "cpu" or not view.is_contiguous():
        raise ProtocolError(f"cannot receive into a tensor on {view.device} with strides {view.stride()}")
    return view


def _join(offer: Mapping[str, Any], control: ControlPlane, backend: str, digest: Digest, timeout: float) -> PairGroup:
    deadline = time.monotonic() + timeout
    told = control.tell({"join": True}, timeout=timeout)
    if "left" in told or told.get("failure") is not None:
        raise ConnectError(f"the server gave the channel up: {told.get('failure')}")
    try:
        key = _read_bytes(told["key"], KEY_BYTES)
        return proven(_meet(told, control, backend, Seals(key, digest), deadline), deadline)
    except (KeyError, ValueError, TypeError) as error:
        raise ProtocolError(f"the server's answer describes no group: {error!r}") from error
    except TransportError as error:
        versions = f"this torch is {torch.__version__}, the server's {offer.get('torch')}"
        raise ConnectError(f"no group with the server: {error} ({versions}{_failure_there(control)})") from error


def _meet(told: Mapping[str, Any], control: ControlPlane, backend: str, seals: Seals, deadline: float) -> PairGroup:
    """This end of a group; whether the other is the server's is yet to be proven."""
    if backend == "nccl":
        return NcclGroup(store_with(bytes.fromhex(told["id"])), CLIENT, torch.device(control.device), seals)
    host, port, name = str(told.get("host", control.address)), int(told["port"]), _read_bytes(told["name"], NAME_BYTES)
    try:
        connection = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), SHORTEST_SECONDS))
    except OSError as error:
        raise ConnectError(
            f"cannot connect to {host}:{port}, where the server expects this client: {error}: open the port (option "
            "port sets it), or name an address that clients reach with option host, both on the server"
        ) from error
    try:
        connection.sendall(name)
    except OSError as error:
        connection.close()
        raise ConnectError(f"{host}:{port} closed the connection: {error}") from error
    return TcpGroup(connection, CLIENT, seals)


def _read_bytes(text: Any, size: int) -> bytes:
    data = bytes.fromhex(text)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes where {size} are expected")
    return data


def _address_towards(host: str) -> str:
    """The address of this machine from which it reaches a host; nothing is sent.

    Raises:
        ConnectError: there is no way to it.
    """
    try:
        kind, _, _, _, peer = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as asking:
            asking.connect(peer)
            return str(ipaddress.ip_address(asking.getsockname()[0]))
    except OSError as error:
        raise ConnectError(f"there is no way to {host!r}: {error}") from error


def _failure_there(control: ControlPlane) -> str:
    """What the server says about a group that did not come up, as the rest of a sentence."""
    try:
        failure = control.tell({"state": True}, timeout=REASON_SECONDS).get("failure")
    except EagleTargetError as error:
        return f"; it cannot be asked why: {error}"
    return f"; it says: {failure}" if failure else ""
