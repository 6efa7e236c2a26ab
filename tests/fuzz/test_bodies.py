"""Bodies, headers and JSON that a server or a client reads: a value, or an error of ours."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from eagle_target.client.http import Checksum
from eagle_target.client.timings import received
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import EagleTargetError, VocabMappingError
from eagle_target.protocol import messages
from eagle_target.protocol.problems import read_problem
from eagle_target.protocol.tensors import decode_tensors, encode_tensors
from eagle_target.testing.tiny import EmbeddingRunner
from eagle_target.testing.transport_harness import MemoryBody
from tests.fuzz.budget import tries
from tests.fuzz.mutations import json_values, mutated, mutated_json, value_or_typed_error
from tests.server.cases import expected_of, mapping_of, request_of
from tests.server.http import body_of

if TYPE_CHECKING:
    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.target import TargetInfo
    from eagle_target.contract.vocab_mapping import VocabMapping

INFO: TargetInfo = EmbeddingRunner().info
MAPPING = mapping_of()
REQUESTS = [body_of(request_of([3, 5])), body_of(request_of([4], encoding="hidden")), body_of(request_of([1] * 9))]
ANSWER = b"".join(encode_tensors(expected_of(request_of([3, 5])), {messages.REQUEST_ID: "x"}))
EMPTY = b"".join(encode_tensors({"a": torch.empty(0, 3), "b": torch.tensor(1.5)}, {}))
HANDSHAKE = messages.Handshake(
    server_version="1",
    target=INFO,
    aux_layer_ids=(1, 3, 4),
    fingerprint="f",
    encodings=("probs",),
    transports={"wire": {}},
    limits=messages.Limits(max_body_bytes=1, max_request_tokens=1, max_batch_tokens=1, max_queue=1),
).model_dump(mode="json")
PROBLEM = {"type": "urn:eagle-target:problem:queue-full", "title": "x", "status": 503, "detail": "d", "retry_after": 1}


def find(sha256: str) -> VocabMapping:
    if sha256 != MAPPING.sha256:
        raise VocabMappingError(f"no mapping {sha256[:64]!r}")
    return MAPPING


def huge(shape: list[int], length: int) -> bytes:
    """A header that says a tensor has this shape and these bytes, which are not there."""
    text = json.dumps({"input_ids": {"dtype": "I64", "shape": shape, "data_offsets": [0, length]}}).encode()
    return len(text).to_bytes(8, "little") + text


@tries(5)
@given(mutated(*REQUESTS, ANSWER, EMPTY))
@example(huge([1 << 40], 8 << 40))
@example(huge([0, 1 << 61], 0))
@example(huge([1 << 62, 4], 0))
def test_a_safetensors_body(data: bytes) -> None:
    value_or_typed_error(lambda: decode_tensors(memoryview(bytearray(data))))


@tries(5)
@given(mutated(*REQUESTS))
def test_a_request(data: bytes) -> None:
    def read() -> None:
        request = messages.decode_request(memoryview(bytearray(data)), find)
        request.check(INFO)
        # What passed the checks can be computed.
        expected_of(request)

    value_or_typed_error(read)


@tries(4)
@given(
    st.lists(st.integers(-3, 1 << 40), max_size=4),
    st.lists(st.sampled_from([-(1 << 63), -1, 0, 5, 210, 211, 1 << 62]), max_size=6),
    st.lists(st.booleans(), max_size=6),
    st.sampled_from(["probs", "hidden", "logits", "", "x" * 100]),
)
def test_a_request_of_numbers_nobody_expects(lens: list[int], ids: list[int], mask: list[bool], encoding: str) -> None:
    tensors = {
        "seq_lens": torch.tensor(lens, dtype=torch.int64),
        "input_ids": torch.tensor(ids, dtype=torch.int64),
        "row_mask": torch.tensor(mask, dtype=torch.bool),
    }
    body = b"".join(encode_tensors(tensors, {"encoding": encoding, "vocab_mapping": MAPPING.sha256}))

    def read() -> SupervisionRequest:
        request = messages.decode_request(memoryview(bytearray(body)), find)
        request.check(INFO)
        return request

    value_or_typed_error(read)


@tries(4)
@given(mutated(b"".join(messages.encode_mapping(MAPPING)), b"".join(messages.encode_mapping(mapping_of(1, 2)))))
def test_a_mapping(data: bytes) -> None:
    value_or_typed_error(lambda: messages.decode_mapping(memoryview(bytearray(data))).sha256)


@tries(4)
@given(
    mutated(json.dumps(HANDSHAKE).encode()) | mutated_json(HANDSHAKE).map(lambda content: json.dumps(content).encode())
)
def test_a_handshake(data: bytes) -> None:
    value_or_typed_error(lambda: messages.read_handshake(data).served.fingerprint)


@tries(4)
@given(mutated(b'{"a": [1, {"b": 2}]}'))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"a": ' + b"9" * 10_000 + b"}")
@example(b'{"a": 1e99999, "b": NaN}')
@example(b"\xff\xfe{}")
def test_a_json_object(data: bytes) -> None:
    value_or_typed_error(lambda: messages.read_json_object(data, "it"))


@tries(4)
@given(
    st.integers(300, 999),
    mutated(json.dumps(PROBLEM).encode()) | json_values().map(lambda value: json.dumps(value).encode()),
    st.text(st.characters(max_codepoint=255), max_size=20) | st.sampled_from(["1", "٣", "²", "-1", "9" * 400, "1e9"]),
)
@example(503, json.dumps(PROBLEM).encode(), "9" * 5000)
@example(503, b"[" * 100_000, "1")
def test_a_problem(status: int, body: bytes, retry_after: str) -> None:
    error = read_problem("http://server", status, {"Retry-After": retry_after}, body)
    assert isinstance(error, EagleTargetError)
    wait = getattr(error, "retry_after", None)
    assert wait is None or wait >= 0


@tries(4)
@given(
    st.text(max_size=30), st.text(max_size=60) | st.sampled_from(["queue;dur=1.5, forward;dur=x, ;dur=", ";dur=nan"])
)
@example("9" * 5000, "queue;dur=1")
@example("²", "queue;dur=inf")
def test_headers_about_sizes_and_times(moved: str, timings: str) -> None:
    value_or_typed_error(lambda: received({messages.MOVED_BYTES: moved, messages.TIMINGS: timings}, 10, 0.1))


@tries(2)
@given(st.none() | st.text(max_size=40), st.integers(0, 2))
def test_a_checksum(announced: str | None, left: int) -> None:
    checksum = Checksum(is_wanted=True)
    checksum.update(memoryview(b"body"))
    with pytest.raises(EagleTargetError):
        checksum.check("http://server", announced, left)


@tries(4)
@given(mutated(ANSWER), st.booleans())
def test_an_answer_over_the_wire(data: bytes, is_longer: bool) -> None:
    from eagle_target_wire.transport import CONTENT_TYPE, WireClientChannel

    def read() -> None:
        length = len(data) + 7 * is_longer
        WireClientChannel().receive(MemoryBody(CONTENT_TYPE, data, length), PackedTensors())

    value_or_typed_error(read)
