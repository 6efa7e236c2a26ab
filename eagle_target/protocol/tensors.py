"""safetensors bodies: written from tensors' own memory, read into memory the caller gives.

8 bytes little-endian length, a JSON header padded to 8 bytes with spaces, then the tensors without holes.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 1 << 20
MAX_DIMENSIONS = 8
METADATA = "__metadata__"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class BodyTensor:
    """One tensor of a body; start and end are bytes from the end of the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a body holds, in the order of its bytes."""

    specs: tuple[BodyTensor, ...]
    metadata: dict[str, str]

    @property
    def data_bytes(self) -> int:
        """Bytes after the header."""
        return self.specs[-1].end if self.specs else 0


def encode_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> list[memoryview]:
    """Return a body in parts: the header, then a view of each tensor's own memory.

    Tensors on a device are copied to the CPU, strided ones made contiguous; others are not copied.

    Raises:
        ProtocolError: a dtype safetensors does not know, or a name that it takes for the metadata.
    """
    # Wide elements first, so that every tensor is aligned to its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    views = []
    start = 0
    for name, tensor in ordered:
        if tensor.dtype not in DTYPE_NAMES:
            raise ProtocolError(f"{name} has dtype {tensor.dtype}, which no body can carry: {sorted(DTYPES)}")
        if name == METADATA:
            raise ProtocolError(f"a tensor cannot be called {METADATA!r}: the format keeps that name")
        view = tensor_bytes(tensor)
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + len(view)],
        }
        start += len(view)
        views.append(view)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(PREFIX_BYTES, "little") + text), *(view for view in views if len(view))]


def decode_tensors(body: memoryview) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a whole body, as views of it, and its metadata.

    Args:
        body: writable bytes, kept alive by the tensors.

    Raises:
        ProtocolError: the body is not safetensors, or longer or shorter than its header says.
    """
    length = header_length(bytes(body[:PREFIX_BYTES]))
    data = body[PREFIX_BYTES + length :]
    header = decode_header(bytes(body[PREFIX_BYTES : PREFIX_BYTES + length]), length)
    if len(data) != header.data_bytes:
        raise ProtocolError(f"the body has {len(data)} bytes of tensors, its header says {header.data_bytes}")
    return {spec.name: _tensor_at(data, spec) for spec in header.specs}, header.metadata


def header_length(prefix: bytes) -> int:
    """Read the header's length from the first 8 bytes.

    Raises:
        ProtocolError: too short, or a length no header of ours has.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) != PREFIX_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
        raise ProtocolError(
            f"the body starts with {prefix[:PREFIX_BYTES].hex() or 'nothing'}, not with the length of a safetensors "
            f"header (2 to {MAX_HEADER_BYTES} bytes)"
        )
    return length


def decode_header(text: bytes, length: int) -> Header:
    """Read and check a header.

    Raises:
        ProtocolError: not JSON, an unknown dtype, shapes and offsets that disagree, holes or overlaps.
    """
    if len(text) != length:
        raise ProtocolError(f"the body ends inside its header: {len(text)} of {length} bytes")
    try:
        entries = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the safetensors header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ProtocolError("the safetensors header is not a JSON object")
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ProtocolError("the safetensors header's __metadata__ is not an object of strings")
    specs = sorted(
        (_read_spec(name, entry) for name, entry in entries.items()), key=lambda spec: (spec.start, spec.end)
    )
    end = 0
    for spec in specs:
        if spec.start != end:
            raise ProtocolError(
                f"tensor {spec.name!r} starts at byte {spec.start}, expected {end}: no holes or overlaps"
            )
        end = spec.end
    return Header(tuple(specs), metadata)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor: its own memory where it is contiguous and on the CPU, else a copy's."""
    flat = tensor.detach().to("cpu").contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def writable_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor's own memory, to be filled.

    Raises:
        ProtocolError: the tensor is strided or on a device, so that filling a copy would be lost.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ProtocolError(f"cannot fill a tensor on {tensor.device} with strides {tensor.stride()} from a body")
    return tensor_bytes(tensor)


def _tensor_at(data: memoryview, spec: BodyTensor) -> torch.Tensor:
    if spec.start == spec.end:
        return torch.empty(spec.shape, dtype=spec.dtype)
    raw = torch.frombuffer(data[spec.start : spec.end], dtype=torch.uint8)
    if raw.data_ptr() % spec.dtype.itemsize:
        raw = raw.clone()
    return raw.view(spec.dtype).view(spec.shape)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key stands twice")
    return entries


def _read_spec(name: str, entry: Any) -> BodyTensor:
    try:
        dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"tensor {name!r} has no valid dtype, shape and data_offsets: {entry!r}") from error
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_size(n) for n in [*shape, start, end]):
        raise ProtocolError(f"tensor {name!r} has shape {shape!r} at {start!r} to {end!r}: whole numbers are expected")
    # An empty tensor's other dimensions take no bytes, but torch's own arithmetic overflows on them.
    if math.prod(shape) * dtype.itemsize != end - start or not _is_size(math.prod(n or 1 for n in shape) * 8):
        raise ProtocolError(f"tensor {name!r} of {entry['dtype']} {shape} does not fill bytes {start} to {end}")
    return BodyTensor(name, dtype, tuple(shape), start, end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
