"""What travels: a ticket in the HTTP body, and the tensors' bytes one after another, cut into messages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.errors import ProtocolError
from eagle_target.protocol.tensors import DTYPE_NAMES, METADATA, decode_header

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eagle_target.protocol.tensors import Header

CONTENT_TYPE = "application/vnd.eagle-target.nccl+json"
MAX_TICKET_BYTES = 2 << 20
# Memory at least so large is sent and received where it lies; what is smaller shares a message and is copied.
LARGE_BYTES = 256 << 10
MAX_CUTS = 4096


@dataclass(frozen=True, slots=True)
class Ticket:
    """What the client gets instead of tensors.

    failure: why the server's end of the channel is of no use any more, if so.
    """

    transfer_id: str
    header: Header
    failure: str | None = None


def ordered(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Tensors in the order of their bytes: wide elements first, so that each is aligned to its element size."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def encode_ticket(
    transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], failure: str | None = None
) -> bytes:
    """The ticket for a transfer; its header is that of a safetensors body.

    Raises:
        ProtocolError: a dtype or name that no body can carry.
    """
    entries: dict[str, Any] = {METADATA: dict(metadata)}
    start = 0
    for name, tensor in ordered(tensors):
        if tensor.dtype not in DTYPE_NAMES or name == METADATA:
            raise ProtocolError(f"{name} of dtype {tensor.dtype} cannot travel: {sorted(DTYPE_NAMES.values())} can")
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    return json.dumps({"transfer": transfer_id, "header": json.dumps(entries), "failure": failure}).encode()


def decode_ticket(content_type: str, data: bytes) -> Ticket:
    """Read and check a ticket.

    Raises:
        ProtocolError: it is none.
    """
    if content_type != CONTENT_TYPE:
        raise ProtocolError(f"the answer is {content_type!r}, expected {CONTENT_TYPE!r}")
    try:
        content = json.loads(data)
        transfer_id, text, failure = content["transfer"], content["header"].encode(), content["failure"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"the answer is no ticket for a transfer: {data[:80]!r}") from error
    if not isinstance(transfer_id, str) or not (failure is None or isinstance(failure, str)):
        raise ProtocolError(f"the ticket's transfer is {transfer_id!r}, its failure {failure!r}")
    return Ticket(transfer_id, decode_header(text, len(text)), failure)


def group_sizes(sizes: Sequence[int], large_bytes: int = LARGE_BYTES) -> list[range]:
    """Group segments of memory into messages: a large one by itself, small neighbours together.

    Returns:
        for each message the segments it holds; empty ones are in none.
    """
    groups: list[range] = []
    open_bytes = 0
    for index, size in enumerate(sizes):
        if size and open_bytes and open_bytes + size <= large_bytes:
            groups[-1] = range(groups[-1].start, index + 1)
            open_bytes += size
        elif size:
            groups.append(range(index, index + 1))
            open_bytes = size if size < large_bytes else 0
    return groups if len(groups) <= MAX_CUTS else group_sizes(sizes, 4 * large_bytes)


class Staging:
    """Memory for messages that are put together from several places, kept from one transfer to the next."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Memory for messages; it is theirs until the next call."""
        total = sum(sizes)
        if len(self._memory) < total:
            self._memory = torch.empty(total, dtype=torch.uint8, device=self._memory.device)
        return list(self._memory[:total].split_with_sizes(list(sizes)))


def cut_bytes(tensors: Sequence[torch.Tensor], cuts: Sequence[int], staging: Staging) -> list[torch.Tensor]:
    """Cut uint8 tensors, seen as one row of bytes, into messages: views where a message lies in one tensor.

    Args:
        tensors: on the staging's device. cuts: bytes of each message; they add up to all bytes.
    """
    starts = [0, *accumulate(len(tensor) for tensor in tensors)]
    parts: list[list[torch.Tensor]] = []
    index = start = 0
    for size in cuts:
        end = start + size
        covering = []
        while start < end:
            while starts[index + 1] <= start:
                index += 1
            stop = min(end, starts[index + 1])
            covering.append(tensors[index][start - starts[index] : stop - starts[index]])
            start = stop
        parts.append(covering)
    gathered = iter(staging.take([size for size, each in zip(cuts, parts, strict=True) if len(each) > 1]))
    return [each[0] if len(each) == 1 else torch.cat(each, out=next(gathered)) for each in parts]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as uint8 `[bytes]`: its own where it is contiguous, else a copy's."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)
