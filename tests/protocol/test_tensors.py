"""safetensors bodies: the stock library reads ours, we read its, and nothing else gets in."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_target.errors import ProtocolError
from eagle_target.protocol.tensors import (
    DTYPES,
    MAX_HEADER_BYTES,
    decode_header,
    decode_tensors,
    encode_tensors,
    writable_bytes,
)
from eagle_target.testing.comparison import assert_same_bits
from eagle_target.testing.transport_harness import random_tensor

SHAPES = [(), (1,), (0,), (7, 3), (0, 5), (5, 0), (2, 3, 4)]
fuzz = settings(deadline=None, derandomize=True, database=None, max_examples=300)


def body_of(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytearray:
    return bytearray(b"".join(encode_tensors(tensors, metadata or {})))


def body_with(header: Any, data: bytes = b"") -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refuse(body: bytearray) -> str:
    """Decode what must be refused, in little memory; returns the message."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError) as caught:
            decode_tensors(memoryview(body))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * len(body) + (1 << 20)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_round_trip_keeps_every_bit(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensors = {"rows": random_tensor(shape, dtype), "beside": random_tensor((3,), torch.int8)}

        decoded, metadata = decode_tensors(memoryview(body_of(tensors, {"a": "b"})))

        assert_same_bits(decoded, tensors)
        assert metadata == {"a": "b"}


def test_stock_library_reads_our_bodies() -> None:
    tensors = {str(dtype): random_tensor((4, 3), dtype) for dtype in DTYPES.values()} | {"none": torch.empty(0, 9)}

    assert_same_bits(safetensors.torch.load(bytes(body_of(tensors, {"key": "é"}))), tensors)


def test_we_read_bodies_of_the_stock_library() -> None:
    tensors = {str(dtype): random_tensor((4, 3), dtype) for dtype in DTYPES.values()} | {"none": torch.empty(0, 9)}

    decoded, metadata = decode_tensors(memoryview(bytearray(safetensors.torch.save(tensors, {"key": "é"}))))

    assert_same_bits(decoded, tensors)
    assert metadata == {"key": "é"}


def test_tensors_are_not_copied_on_the_way_out_or_in() -> None:
    rows = torch.zeros(1000, dtype=torch.float32)
    parts = encode_tensors({"rows": rows}, {})
    rows[0] = 1.5

    body = bytearray(b"".join(parts))
    decoded, _ = decode_tensors(memoryview(body))
    decoded["rows"][1] = 2.5

    assert decoded["rows"][0] == 1.5
    again, _ = decode_tensors(memoryview(body))
    assert again["rows"][1] == 2.5


def test_strided_tensors_are_written_in_row_order() -> None:
    rows = torch.arange(12.0).view(3, 4)

    decoded, _ = decode_tensors(memoryview(body_of({"t": rows.T, "step": rows[:, ::2]})))

    assert_same_bits(decoded, {"t": rows.T, "step": rows[:, ::2]})


def test_nothing_is_a_body_too() -> None:
    assert decode_tensors(memoryview(body_of({}))) == ({}, {})


def test_misaligned_tensors_of_others_are_read() -> None:
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [1], [1, 5])}
    value = torch.tensor([1.25]).view(torch.uint8).numpy().tobytes()

    decoded, _ = decode_tensors(memoryview(body_with(header, b"\x07" + value)))

    assert decoded["b"].tolist() == [1.25]


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.uint16)])
def test_dtypes_without_a_name_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ProtocolError, match="no body can carry"):
        encode_tensors({"rows": tensor}, {})


def test_a_tensor_cannot_take_the_place_of_the_metadata() -> None:
    with pytest.raises(ProtocolError, match="__metadata__"):
        encode_tensors({"__metadata__": torch.zeros(2)}, {"a": "b"})


def test_strided_memory_is_not_filled() -> None:
    with pytest.raises(ProtocolError, match="strides"):
        writable_bytes(torch.zeros(4, 4).T[1:])


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, bytes(7), "7 bytes of tensors"),
        ({"a": entry()}, bytes(9), "9 bytes of tensors"),
        ({"a": entry(offsets=[8, 16])}, bytes(16), "no holes or overlaps"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "no holes or overlaps"),
        ({"a": entry(), "b": entry(offsets=[0, 8])}, bytes(8), "no holes or overlaps"),
        ({"a": entry(), "b": entry(offsets=[9, 17])}, bytes(17), "no holes or overlaps"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "does not fill"),
        ({"a": entry(offsets=[-8, 0])}, bytes(8), "whole numbers"),
        ({"a": entry(shape=[-2])}, bytes(8), "whole numbers"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "whole numbers"),
        ({"a": entry(offsets=[False, 8])}, bytes(8), "whole numbers"),
        ({"a": entry(shape=[2.0])}, bytes(8), "whole numbers"),
        ({"a": entry(shape=["2"])}, bytes(8), "whole numbers"),
        ({"a": entry(shape=2)}, bytes(8), "whole numbers"),
        ({"a": entry(shape=[1] * 9)}, bytes(4), "whole numbers"),
        ({"a": entry(shape=[1 << 62])}, bytes(8), "whole numbers"),
        ({"a": entry(shape=[1 << 61, 0], offsets=[0, 0])}, b"", "does not fill"),
        ({"a": entry(shape=[1 << 40, 1 << 40, 0], offsets=[0, 0])}, b"", "does not fill"),
        ({"a": entry(shape=[1 << 40], offsets=[0, 1 << 42])}, bytes(8), "bytes of tensors"),
        ({"a": entry(offsets=[0])}, bytes(8), "no valid"),
        ({"a": entry(offsets=[0, 4, 8])}, bytes(8), "no valid"),
        ({"a": entry(offsets=None)}, bytes(8), "no valid"),
        ({"a": entry("F99")}, bytes(8), "no valid"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "no valid"),  # type: ignore[arg-type]
        ({"a": {"dtype": "F32"}}, bytes(8), "no valid"),
        ({"a": []}, bytes(8), "no valid"),
        ({"a": "F32"}, bytes(8), "no valid"),
        ({"a": None}, bytes(8), "no valid"),
        ({"__metadata__": None}, b"", "object of strings"),
        ({"__metadata__": {"a": 1}}, b"", "object of strings"),
        ({"__metadata__": ["a"]}, b"", "object of strings"),
        ([], b"", "not a JSON object"),
        (None, b"", "not a JSON object"),
        (b'{"a": 1, "a": 1}', b"", "twice"),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', b"", "twice"),
        (b"{" * 50000, b"", "not JSON"),
        (b'{"a":' * 50000 + b"1" + b"}" * 50000, b"", "not JSON"),
        (b"[" * 100000 + b"]" * 100000, b"", "not JSON"),
        (b'{"a": ' + b"9" * 10000 + b"}", b"", "not JSON"),
        (b'{"\xff": 1}', b"", "not JSON"),
        (b"  ", b"", "not JSON"),
    ],
)
def test_a_lying_header_is_refused(header: Any, data: bytes, message: str) -> None:
    assert message in refuse(body_with(header, data))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x02",
        bytes(8),
        (1).to_bytes(8, "little") + b"{",
        (1 << 63).to_bytes(8, "little") + b"{}",
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        (MAX_HEADER_BYTES).to_bytes(8, "little") + b"{}",
        b"\x80\x05\x95pickle" + bytes(100),
        b"<html><body>502 Bad Gateway</body></html>",
    ],
    ids=len,
)
def test_a_body_without_a_header_is_refused(body: bytes) -> None:
    refuse(bytearray(body))


@fuzz
@given(st.binary(max_size=400))
def test_random_bytes_are_refused_or_read(data: bytes) -> None:
    try_to_decode(bytearray(data))


@fuzz
@given(st.binary(max_size=300), st.binary(max_size=40))
def test_random_headers_are_refused_or_read(header: bytes, data: bytes) -> None:
    try_to_decode(body_with(header, data))


numbers = st.one_of(
    st.integers(-2, 40), st.integers(0, 1 << 70), st.booleans(), st.floats(), st.none(), st.text(max_size=2)
)
sizes = st.one_of(st.lists(st.integers(0, 4), max_size=4), st.lists(numbers, max_size=10), numbers)
entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from([*DTYPES]), numbers),
            "shape": sizes,
            "data_offsets": st.one_of(
                st.tuples(st.integers(0, 40), st.integers(0, 40)), st.lists(numbers, max_size=3), sizes
            ),
        },
        optional={"more": numbers},
    ),
    numbers,
)
headers = st.dictionaries(st.one_of(st.text(max_size=3), st.just("__metadata__")), entries, max_size=4)


@fuzz
@given(headers, st.binary(max_size=60))
def test_plausible_headers_are_refused_or_read(header: dict[str, Any], data: bytes) -> None:
    try_to_decode(body_with(header, data))


@fuzz
@given(st.integers(0, 200), st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_read(position: int, value: int) -> None:
    body = body_of({"rows": torch.arange(6.0).view(2, 3), "ids": torch.arange(3)}, {"k": "v"})
    body[position % len(body)] = value

    try_to_decode(body)


@fuzz
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from([*DTYPES.values()]), st.lists(st.integers(0, 3), max_size=4)),
        max_size=5,
    ),
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
)
def test_any_tensors_and_metadata_come_back(
    wanted: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> None:
    tensors = {name: random_tensor(shape, dtype) for name, (dtype, shape) in wanted.items()}

    decoded, back = decode_tensors(memoryview(body_of(tensors, metadata)))

    assert_same_bits(decoded, tensors)
    assert back == metadata


def try_to_decode(body: bytearray) -> None:
    try:
        tensors, _ = decode_tensors(memoryview(body))
    except ProtocolError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(body)


def test_the_largest_header_is_read_and_one_more_byte_is_not() -> None:
    text = b"{}" + b" " * (MAX_HEADER_BYTES - 2)

    assert decode_header(text, len(text)).specs == ()
    assert decode_tensors(memoryview(body_with(text))) == ({}, {})
    refuse(body_with(text + b" "))
