"""The server's end of one client: an outbox, and a thread that sends from it what the client asks for."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eagle_target.contract.sinks import PackedTensors
from eagle_target.devices import use_device
from eagle_target.errors import TransportError
from eagle_target.plugins.transport import Reply, ServerChannel
from eagle_target_nccl.device_tensors import DeviceTensors
from eagle_target_nccl.layout import (
    CONTENT_TYPE,
    MAX_CUTS,
    Staging,
    as_bytes,
    cut_bytes,
    encode_ticket,
    ordered,
)
from eagle_target_nccl.outbox import Outbox, Parcel
from eagle_target_nccl.proofs import Transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from eagle_target_nccl.groups import PairGroup
    from eagle_target_nccl.meetings import Meeting
    from eagle_target_nccl.options import NcclOptions

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 1.0
CHECKS_A_TIMEOUT = 4


@dataclass(frozen=True, slots=True)
class Pull:
    """What the client asked for. cuts: bytes of each message."""

    parcel: Parcel
    transfer: Transfer
    cuts: tuple[int, ...]


class NcclServerChannel(ServerChannel):
    """Sends to one client. Its thread lives from the client's joining until nothing is sent for long, or the end.

    Args:
        arrange: gives a new meeting. device: where messages lie.
    """

    def __init__(self, options: NcclOptions, arrange: Callable[[], Meeting], device: torch.device) -> None:
        self._options = options
        self._arrange = arrange
        self._device = device
        self._names = itertools.count(1)
        self._outbox = Outbox(options.outbox_bytes, options.transfer_timeout)
        self._pulls: queue.SimpleQueue[Pull | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._meeting: Meeting | None = None
        self._group: PairGroup | None = None
        self._failure: str | None = None

    def new_tensors(self) -> PackedTensors:
        """Where NCCL sends from, memory of the target's device."""
        return DeviceTensors(self._device) if self._device.type == "cuda" else PackedTensors()

    def send(self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Reply:
        """Keep the tensors until the client asks for them, and return the ticket for them."""
        if self._failure is not None:
            ticket, moved = encode_ticket(transfer_id, {}, {}, self._failure), 0
        else:
            # A client that uses an id twice gets no other answer's tensors for it.
            name = f"{transfer_id}/{next(self._names)}"
            ticket = encode_ticket(name, tensors, metadata)
            parcel = Parcel(tensors)
            self._outbox.put(name, parcel)
            moved = parcel.length
        return Reply(CONTENT_TYPE, [memoryview(ticket)], moved)

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Say where to join, or send what is pulled; always tells whether the channel failed, and why.

        `gone`: there is no such transfer. `left`: this end is in no group, the client is to join another.
        """
        answer: dict[str, Any] = {}
        if "pull" in message:
            answer = self._pull(message)
        elif "join" in message:
            answer = self._join()
        elif "state" not in message:
            raise TransportError(f"a channel of transport 'nccl' does not know {sorted(message)}")
        return {**answer, "failure": self._failure}

    def close(self) -> None:
        """Drop what waits and end the group, in the middle of a transfer if need be."""
        self._fail("the server closed the channel")
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            # One in the midst of NCCL's start ends by itself, after connect_timeout.
            thread.join(CLOSE_SECONDS)

    def _join(self) -> dict[str, Any]:
        with self._lock:
            if self._failure is not None:
                return {}
            if self._thread is not None:
                raise TransportError("this channel has a group already: open another channel")
            meeting = self._meeting = self._arrange()
            self._thread = threading.Thread(target=self._serve, args=(meeting,), name="eagle-target-nccl", daemon=True)
            self._thread.start()
        return meeting.told()

    def _pull(self, message: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self._thread is None or self._failure is not None:
                return {"left": True}
            if not self._pulls.empty():
                raise TransportError("a client pulls one transfer at a time")
            name = str(message["pull"])
            parcel = self._outbox.take(name)
            if parcel is None:
                return {"gone": True}
            self._pulls.put(_read_pull(message, name, parcel))
        return {}

    def _serve(self, meeting: Meeting) -> None:
        group = None
        try:
            use_device(self._device)
            group = meeting.open()
            with self._lock:
                self._group = group
            if self._failure is None:
                self._send_pulls(group)
        except TransportError as error:
            logger.warning("a channel of transport 'nccl' is given up: %s", error)
            self._fail(str(error))
        except Exception as error:
            logger.exception("sending over transport 'nccl' failed")
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            meeting.cancel()
            if group is not None:
                group.abort()

    def _send_pulls(self, group: PairGroup) -> None:
        staging = Staging(group.device)
        used_at = time.monotonic()
        pause = min(self._options.transfer_timeout, self._options.idle_timeout) / CHECKS_A_TIMEOUT
        while self._failure is None:
            try:
                pull = self._pulls.get(timeout=pause)
            except queue.Empty:
                if (
                    not self._outbox.expire()
                    and time.monotonic() - used_at > self._options.idle_timeout
                    and self._leave()
                ):
                    return
                continue
            if pull is not None:
                self._send(group, pull, staging)
            # Not kept while waiting for the next.
            del pull
            used_at = time.monotonic()

    def _leave(self) -> bool:
        """Whether the group may end: the client has asked for nothing meanwhile."""
        with self._lock:
            if self._pulls.empty():
                self._thread = self._group = None
            return self._thread is None

    def _send(self, group: PairGroup, pull: Pull, staging: Staging) -> None:
        deadline = time.monotonic() + self._options.transfer_timeout
        with pull.parcel.on_stream(group.device):
            tensors = [as_bytes(tensor.to(group.device)) for _, tensor in ordered(pull.parcel.tensors)]
            group.push(cut_bytes(tensors, pull.cuts, staging), pull.transfer, deadline)

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = reason
            group, meeting = self._group, self._meeting
        if meeting is not None:
            meeting.cancel()
        if group is not None:
            group.abort()
        self._outbox.clear()
        with contextlib.suppress(queue.Empty):
            while True:
                self._pulls.get_nowait()
        self._pulls.put(None)


def _read_pull(message: Mapping[str, Any], name: str, parcel: Parcel) -> Pull:
    number, cuts = message.get("number"), message.get("cuts")
    numbers = [number, *cuts] if isinstance(cuts, list) and len(cuts) <= MAX_CUTS else []
    if (
        not numbers
        or not all(isinstance(each, int) and each > 0 for each in numbers)
        or sum(cuts or []) != parcel.length
    ):
        raise TransportError(f"a pull of {parcel.length} bytes names number {number!r} and cuts that do not add up")
    return Pull(parcel, Transfer(name, numbers[0], parcel.length), tuple(numbers[1:]))
