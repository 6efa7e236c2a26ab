"""The HTTP body of a transfer: where its tensors lie. Checked before any memory is touched."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eagle_target.errors import ProtocolError
from eagle_target.protocol.tensors import DTYPE_NAMES, DTYPES, MAX_DIMENSIONS
from eagle_target_shm.arena import MAX_LOANS
from eagle_target_shm.segment import HEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from eagle_target.plugins.transport import IncomingBody

CONTENT_TYPE = "application/vnd.eagle-target.shm+json"
MAX_BODY_BYTES = 1 << 20
MAX_NUMBER = 1 << 62
# Loans of device memory are numbered from here on.
FIRST_CUDA_NUMBER = 1 << 40
HOST, CUDA = "host", "cuda"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies: bytes from the start of a memory's segment. An empty tensor lies nowhere."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    memory: str
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Ticket:
    """One transfer. loans: number by memory. event: handle of what the device must have reached."""

    places: Sequence[Place]
    loans: Mapping[str, int]
    metadata: dict[str, str]
    event: bytes | None = None

    def encode(self) -> memoryview:
        """As a body."""
        content = {
            "tensors": [
                [place.name, DTYPE_NAMES[place.dtype], list(place.shape), place.memory, place.offset]
                for place in self.places
            ],
            "loans": dict(self.loans),
            "metadata": self.metadata,
            "event": None if self.event is None else self.event.hex(),
        }
        return memoryview(json.dumps(content, separators=(",", ":")).encode())


def check_sendable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse what no ticket can describe.

    Raises:
        ProtocolError: a dtype or a number of dimensions that readers do not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or tensor.dim() > MAX_DIMENSIONS:
            raise ProtocolError(
                f"{name} has dtype {tensor.dtype} and {tensor.dim()} dimensions, which no ticket can carry: "
                f"{sorted(DTYPES)}, up to {MAX_DIMENSIONS}"
            )


def read_ticket(body: IncomingBody, sizes: Mapping[str, int]) -> Ticket:
    """Read and check a ticket.

    Args:
        body: as it comes. sizes: bytes of each memory that is mapped.

    Raises:
        ProtocolError: it is none, or names bytes outside the memory.
    """
    if body.content_type != CONTENT_TYPE or not 0 < body.length <= MAX_BODY_BYTES:
        raise ProtocolError(f"the answer is {body.content_type!r} of {body.length} bytes, expected {CONTENT_TYPE!r}")
    text = bytearray(body.length)
    body.readinto(memoryview(text))
    try:
        content = json.loads(text)
        tensors, loans, metadata = content["tensors"], content["loans"], content["metadata"]
        event = None if content["event"] is None else bytes.fromhex(content["event"])
        places = [_read_place(entry, sizes) for entry in tensors]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError(f"the answer is no ticket: {error!r}: {bytes(text[:200])!r}") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ProtocolError("the ticket's metadata is not an object of strings")
    if not isinstance(loans, dict) or not {place.memory for place in places if place.size} <= {*loans} <= {*sizes}:
        raise ProtocolError(f"the ticket's loans are {str(loans)[:200]}, mapped is {sorted(sizes)}")
    if not all(_is_number(number, memory) for memory, number in loans.items()):
        raise ProtocolError(f"the ticket has loans {loans}, which no server numbers so")
    if len({place.name for place in places}) != len(places):
        raise ProtocolError("the ticket names a tensor twice")
    return Ticket(places, loans, metadata, event)


def slot_of(number: int) -> int:
    """The slot of a loan, of which the client knows the latest."""
    return number % MAX_LOANS + (MAX_LOANS if number >= FIRST_CUDA_NUMBER else 0)


def _read_place(entry: Any, sizes: Mapping[str, int]) -> Place:
    name, dtype_name, shape, memory, offset = entry
    if not isinstance(name, str) or not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name!r} of shape {shape!r}")
    if not all(_is_size(length) for length in [*shape, offset]) or not _is_size(math.prod(n or 1 for n in shape) * 8):
        raise ValueError(f"{name!r} has shape {shape} at {offset!r}: whole numbers are expected")
    place = Place(name, DTYPES[dtype_name], tuple(shape), str(memory), offset)
    if place.size and not (HEAD_BYTES <= offset <= sizes[memory] - place.size and not offset % place.dtype.itemsize):
        raise ValueError(f"{name!r} of {place.size} bytes at {offset} does not lie in the {memory} memory")
    return place


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_NUMBER


def _is_number(number: Any, memory: str) -> bool:
    return _is_size(number) and (number >= FIRST_CUDA_NUMBER) == (memory == CUDA)
