"""Supervision that waits for one client to ask for it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING

import torch

from eagle_target.protocol.problems import ProblemType
from eagle_target_nccl.device_tensors import DeviceTensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0


class Parcel:
    """Tensors to be sent; the mapping itself is kept, for as long as they are needed.

    On CUDA they may still be written by work that was queued when the parcel was made: by the streams of
    `DeviceTensors`, or by the current stream of who made it.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.length = sum(tensor.nbytes for tensor in tensors.values())
        self.put_at = time.monotonic()
        self._ready: list[torch.cuda.Event] = []
        if isinstance(tensors, DeviceTensors):
            self._ready = tensors.events()
        else:
            devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
            self._ready = [torch.cuda.current_stream(device).record_event() for device in devices]

    @contextlib.contextmanager
    def on_stream(self, device: torch.device) -> Iterator[None]:
        """Run the block's CUDA work on this thread's stream of the device, after that which makes the tensors."""
        if device.type != "cuda":
            for event in self._ready:
                event.synchronize()
            yield
            return
        with torch.cuda.device(device):
            for event in self._ready:
                torch.cuda.current_stream(device).wait_event(event)
            yield


class Outbox:
    """Parcels by transfer id.

    Args:
        max_bytes: of all; a single parcel may be larger. lifetime: seconds after which a parcel is dropped.
    """

    def __init__(self, max_bytes: int, lifetime: float) -> None:
        self._max_bytes = max_bytes
        self._lifetime = lifetime
        self._lock = threading.Lock()
        self._parcels: dict[str, Parcel] = {}
        self._closed = False

    def put(self, transfer_id: str, parcel: Parcel) -> None:
        """Keep a parcel; after `clear` it is dropped.

        Raises:
            Overloaded: the client has too much waiting.
        """
        self.expire()
        with self._lock:
            waiting = sum(each.length for each in self._parcels.values())
            if self._parcels and waiting + parcel.length > self._max_bytes:
                raise ProblemType.QUEUE_FULL.error(
                    f"{waiting} bytes wait for this client, {parcel.length} more are over outbox_bytes, "
                    f"{self._max_bytes}: receive them, or ask for less at a time",
                    retry_after=RETRY_SECONDS,
                )
            if not self._closed:
                self._parcels[transfer_id] = parcel

    def take(self, transfer_id: str) -> Parcel | None:
        """Take a parcel; None where there is none, or no more."""
        with self._lock:
            return self._parcels.pop(transfer_id, None)

    def expire(self) -> int:
        """Drop what was not asked for in time; returns how many parcels are left."""
        oldest = time.monotonic() - self._lifetime
        with self._lock:
            late = [name for name, parcel in self._parcels.items() if parcel.put_at < oldest]
            for name in late:
                del self._parcels[name]
            left = len(self._parcels)
        if late:
            logger.warning("dropped %d transfers that their client did not ask for in time", len(late))
        return left

    def clear(self) -> None:
        """Drop every parcel and keep no more."""
        with self._lock:
            self._closed = True
            self._parcels.clear()
