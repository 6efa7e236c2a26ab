"""Device memory that another process maps: CUDA IPC, through the runtime library that torch has loaded.

torch's own sharing keeps its counts in files of /dev/shm, which stay there when a process is killed, and never frees
what a killed reader held; so one allocation is shared here, once, and its use is counted as that of other memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from eagle_target.errors import ConnectError
from eagle_target_shm.segment import PROBE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1


class MemoryHandle(ctypes.Structure):
    """cudaIpcMemHandle_t."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class Runtime:
    """The few calls of libcudart that torch does not have.

    Raises:
        ConnectError: the library is not there; or, from a call, what CUDA says.
    """

    def __init__(self) -> None:
        major = (torch.version.cuda or "").partition(".")[0]
        try:
            self._library = ctypes.CDLL(f"libcudart.so.{major}")
        except OSError as error:
            raise ConnectError(f"device memory cannot be shared: {error}") from error
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def allocate(self, size: int) -> int:
        """Memory on the current device."""
        address = ctypes.c_void_p()
        self._check("cudaMalloc", self._library.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size)))
        return int(address.value or 0)

    def free(self, address: int) -> None:
        """Give it back."""
        self._check("cudaFree", self._library.cudaFree(ctypes.c_void_p(address)))

    def export(self, address: int) -> bytes:
        """The handle by which another process opens it."""
        handle = MemoryHandle()
        status = self._library.cudaIpcGetMemHandle(ctypes.byref(handle), ctypes.c_void_p(address))
        self._check("cudaIpcGetMemHandle", status)
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Another process's memory, on the current device."""
        address = ctypes.c_void_p()
        status = self._library.cudaIpcOpenMemHandle(
            ctypes.byref(address), MemoryHandle.from_buffer_copy(handle), ctypes.c_uint(LAZY_PEER_ACCESS)
        )
        self._check("cudaIpcOpenMemHandle", status)
        return int(address.value or 0)

    def close(self, address: int) -> None:
        """Unmap it."""
        self._check("cudaIpcCloseMemHandle", self._library.cudaIpcCloseMemHandle(ctypes.c_void_p(address)))

    def _check(self, call: str, status: int) -> None:
        if status:
            # Else the next kernel of this thread would report it.
            self._library.cudaGetLastError()
            text = self._library.cudaGetErrorString(status).decode("ascii", "replace")
            raise ConnectError(f"device memory cannot be shared: {call} says {text} ({status})")


class Allocation(NamedTuple):
    """Memory at an address of a device. used_on: streams of this process that write to it."""

    device: torch.device
    size: int
    address: int
    used_on: set[torch.cuda.Stream]


class DeviceBytes:
    """A part of device memory, as torch takes it from strangers without a copy. owner: kept alive by it."""

    def __init__(self, owner: object, address: int, size: int) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


class DeviceSegment:
    """One allocation of a device, made here or mapped from another process, as long as this or a tensor in it lives.

    device: of this process's numbering. size: bytes. used_on: streams of this process that write to it.

    Args:
        address: of the allocation. give_up: called with it when the segment's end has come.
    """

    def __init__(self, device: torch.device, size: int, address: int, give_up: Callable[[Allocation], None]) -> None:
        self.device = device
        self.size = size
        self.used_on: set[torch.cuda.Stream] = set()
        self._address = address
        # Tensors of answers outlive their channel.
        weakref.finalize(self, give_up, Allocation(device, size, address, self.used_on)).atexit = False

    @property
    def handle(self) -> bytes:
        """By which another process opens it."""
        return Runtime().export(self._address)

    def tensor(
        self, offset: int, shape: Sequence[int], dtype: torch.dtype, released: Callable[..., Any], *arguments: Any
    ) -> torch.Tensor:
        """A tensor at an offset; `released(*arguments)` is called when nothing refers to its memory any more."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if not 0 < size <= self.size - offset:
            raise ValueError(f"{size} bytes at {offset} are no part of device memory of {self.size} bytes")
        part = DeviceBytes(self, self._address + offset, size)
        weakref.finalize(part, released, *arguments).atexit = False
        return torch.as_tensor(part, device=self.device).view(dtype).view(tuple(shape))

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where a contiguous tensor begins in the segment; None if it lies elsewhere."""
        offset = tensor.data_ptr() - self._address
        inside = tensor.device == self.device and 0 <= offset <= self.size - tensor.nbytes
        return offset if inside and tensor.is_contiguous() else None

    def write_probe(self, probe: bytes) -> None:
        """Write what shows a peer that it mapped this very memory."""
        self._probe().copy_(torch.frombuffer(bytearray(probe), dtype=torch.uint8))
        torch.cuda.current_stream(self.device).synchronize()

    def read_probe(self) -> bytes:
        """Read it."""
        return bytes(self._probe().tolist())

    def _probe(self) -> torch.Tensor:
        return self.tensor(0, (PROBE_BYTES,), torch.uint8, int)


class SegmentPool:
    """Allocations of this process: those that are no longer used are for the next channel that wants as much.

    Giving memory back to CUDA waits for everything that runs on the device, sends to clients included that spin until
    the client takes them; so it is done at the end only.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unused: list[Allocation] = []
        # A finalizer may come in the middle of anything, in a thread that holds the lock.
        self._returned: queue.SimpleQueue[Allocation] = queue.SimpleQueue()
        self._closed = False

    def take(self, device: torch.device, size: int) -> DeviceSegment:
        """A segment of whatever values.

        Raises:
            ConnectError: there is no memory for it.
        """
        with self._lock:
            self._unused += self._take_returned()
            fitting = [each for each in self._unused if (each.device, each.size) == (device, size)]
            if fitting:
                self._unused.remove(fitting[0])
        if not fitting:
            with torch.cuda.device(device):
                _make_context(device)
                address = Runtime().allocate(size)
            return DeviceSegment(device, size, address, self._give_back)
        for stream in fitting[0].used_on:
            # What was queued for its last user may still be written.
            stream.synchronize()
        return DeviceSegment(device, size, fitting[0].address, self._give_back)

    def close(self) -> None:
        """Give back what is not used now, and the rest as it comes. Safe to call twice."""
        with self._lock:
            self._closed = True
            unused, self._unused = self._unused, []
        for each in [*unused, *self._take_returned()]:
            _free(each)

    def _take_returned(self) -> Iterator[Allocation]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._returned.get_nowait()

    def _give_back(self, allocation: Allocation) -> None:
        self._returned.put(allocation)
        if self._closed:
            for each in self._take_returned():
                _free(each)


def map_segment(device: torch.device, size: int, handle: bytes) -> DeviceSegment:
    """Another process's segment.

    Raises:
        ConnectError: it cannot be mapped here.
    """
    with torch.cuda.device(device):
        _make_context(device)
        return DeviceSegment(device, size, Runtime().open(handle), _unmap)


def _make_context(device: torch.device) -> None:
    torch.cuda.current_stream(device).synchronize()


def _free(allocation: Allocation) -> None:
    with torch.cuda.device(allocation.device):
        Runtime().free(allocation.address)


def _unmap(allocation: Allocation) -> None:
    with torch.cuda.device(allocation.device):
        Runtime().close(allocation.address)


def mark(device: torch.device, streams: Iterable[torch.cuda.Stream]) -> tuple[torch.cuda.Event, bytes]:
    """An event that is over when all that these streams and the current one were given is, and its handle."""
    with torch.cuda.device(device):
        here = torch.cuda.current_stream(device)
        for stream in streams:
            here.wait_stream(stream)
        event = torch.cuda.Event(interprocess=True)  # type: ignore[no-untyped-call]
        event.record(here)
        return event, bytes(event.ipc_handle())  # type: ignore[no-untyped-call]


def wait_for(device: torch.device, handle: bytes) -> None:
    """Let the current stream wait for another process's event."""
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).wait_event(torch.cuda.Event.from_ipc_handle(device, handle))  # type: ignore[no-untyped-call]


def device_name(device: torch.device) -> str:
    """What a device is called in every process, whatever its number there."""
    return str(torch.cuda.get_device_properties(device).uuid)


def find_device(name: str, reader: torch.device) -> torch.device:
    """The device of a name, as this process numbers it, if `reader` can read its memory.

    Raises:
        ConnectError: with the reason.
    """
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if device_name(device) == name:
            if reader.index != index and not torch.cuda.can_device_access_peer(reader.index, index):
                raise ConnectError(
                    f"{reader} cannot read the memory of the target's GPU {name}: use transport 'nccl' or 'wire'"
                )
            return device
    raise ConnectError(
        f"the target's GPU {name} is not among the {torch.cuda.device_count()} that this process sees: let it see that "
        "one, too (CUDA_VISIBLE_DEVICES), or use transport 'nccl' or 'wire'"
    )


def current_streams(devices: Iterable[torch.device]) -> set[torch.cuda.Stream]:
    """The calling thread's stream of each device."""
    return {torch.cuda.current_stream(device) for device in devices}


def settle(streams: Iterable[torch.cuda.Stream]) -> None:
    """Wait until streams are done with what they were given."""
    for stream in streams:
        stream.synchronize()
