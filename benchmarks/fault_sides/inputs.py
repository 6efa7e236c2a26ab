"""Bad inputs, sent over bare sockets to a server that has a token and small limits."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.protocol import messages, problems
from eagle_target.protocol.tensors import encode_tensors
from tests.faults.processes import faulty_server
from tests.server.cases import VOCAB_SIZE, assert_same_tensors, expected_of, mapping_of, request_of
from tests.server.http import body_of, connected, read_answer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server.http import Answer

TOKEN = "t" * 32
TIMEOUT_SECONDS = 0.3
LIMITS: dict[str, Any] = {
    "token": TOKEN,
    "max_body_bytes": 1 << 16,
    "max_request_tokens": 1000,
    "max_sequence_tokens": 500,
    "max_sequences": 100,
    "max_header_bytes": 4096,
    "max_mapping_bytes": 4096,
    "body_timeout": TIMEOUT_SECONDS,
    "headers_timeout": TIMEOUT_SECONDS,
    "transports": ("wire", "shm"),
}
HUNG_UP = "hangs up"


@dataclass
class Answers:
    """What came back, how often, and the longest it took. right: good requests answered well right after."""

    given: Counter[str] = field(default_factory=Counter)
    right: int = 0
    longest: float = 0.0


def request(
    method: str, path: str, body: bytes = b"", *, length: object = None, token: str = TOKEN, extra: str = ""
) -> bytes:
    """A whole request; it may lie about its length."""
    said = len(body) if length is None else length
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n{extra}Content-Length: {said}\r\n\r\n"
    )
    return head.encode() + body


def tensors(metadata: dict[str, str] | None = None, **given: torch.Tensor) -> bytes:
    """A request for supervision with these tensors."""
    metadata = {"vocab_mapping": mapping_of().sha256, **(metadata or {})}
    return request("POST", messages.SUPERVISION, b"".join(encode_tensors(given, metadata)))


def ids(*values: float, lens: tuple[int, ...] | None = None) -> bytes:
    """A request of these ids, which are floats where one is."""
    return tensors(input_ids=torch.tensor(values), seq_lens=torch.tensor(lens or (len(values),)))


def lying(**entry: Any) -> bytes:
    """A safetensors header that says of its one tensor what is not so."""
    text = json.dumps({"input_ids": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16], **entry}}).encode()
    return request("POST", messages.SUPERVISION, len(text).to_bytes(8, "little") + text + bytes(16))


def supervision(body: bytes, **options: Any) -> bytes:
    """A body for supervision."""
    return request("POST", messages.SUPERVISION, body, **options)


def bad_inputs() -> Iterator[tuple[str, bytes, str]]:
    """What is sent, its bytes, and the answer that is due."""
    good, mapping = body_of(request_of([4])), b"".join(messages.encode_mapping(mapping_of()))
    other = f"{messages.VOCAB_MAPPINGS}/{'0' * 64}"
    yield "slow loris: headers that do not end", b"GET /health HTTP/1.1\r\nA: b\r\n", HUNG_UP
    yield "slow loris: a body that does not end", supervision(b"x", length=500), "408 body-timeout"
    yield "body over the limit", supervision(b"", length=1 << 17), "413 body-too-large"
    yield "body of 10^18 bytes announced", supervision(b"", length=10**18), "413 body-too-large"
    yield "headers over the limit", request("GET", "/health", extra=f"A: {'x' * 5000}\r\n"), "431 headers-too-large"
    yield "Content-Length shorter than the body", supervision(good, length=len(good) - 8), "400"
    yield "Content-Length that is no number", supervision(good, length="1e3"), "400"
    yield (
        "no Content-Length",
        b"POST /v1/supervision HTTP/1.1\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n\r\n",
        "411 length-required",
    )
    yield "truncated safetensors", supervision(good[: len(good) // 2]), "400 malformed-body"
    yield "safetensors header of 2^62 bytes", supervision((1 << 62).to_bytes(8, "little") + b"{}"), "400 malformed-body"
    yield "safetensors header: shape of 2^40", lying(shape=[1 << 40]), "400 malformed-body"
    yield "safetensors header: offsets past the end", lying(data_offsets=[0, 1 << 60]), "400 malformed-body"
    yield "safetensors header: overlap", lying(data_offsets=[8, 24]), "400 malformed-body"
    yield "safetensors header: unknown dtype", lying(dtype="Q9"), "400 malformed-body"
    yield (
        "JSON nested 10 000 deep",
        request("POST", "/v1/transports/wire/channels", b"[" * 10_000),
        "400 malformed-body",
    )
    yield "NaN as an id", ids(float("nan"), 1.0), "422 contract"
    yield "id past the vocabulary", ids(1, VOCAB_SIZE), "422 contract"
    yield "negative id", ids(1, -1), "422 contract"
    yield "lengths that do not add up", ids(1, 2, 3, lens=(2,)), "422 contract"
    yield "negative length", ids(1, 2, lens=(3, -1)), "422 contract"
    yield "too many tokens", ids(*[1] * 1001), "413 too-many-tokens"
    yield "sequence too long", ids(*[1] * 501), "413 sequence-too-long"
    yield "too many sequences", ids(*[1] * 101, lens=(1,) * 101), "413 too-many-sequences"
    yield (
        "unknown encoding",
        tensors({"encoding": "x"}, input_ids=torch.tensor([1]), seq_lens=torch.tensor([1])),
        "422 contract",
    )
    yield "unknown mapping", supervision(body_of(request_of([4], mapping=mapping_of(1)))), "409 unknown-vocab-mapping"
    yield "mapping under another's hash", request("PUT", other, mapping), "422 invalid-vocab-mapping"
    yield "mapping over the limit", request("PUT", other, length=1 << 13), "413 mapping-too-large"
    yield "mapping with an id twice", request("PUT", other, twice()), "422 invalid-vocab-mapping"
    yield "wrong token", supervision(good, token="u" * 32), "401 unauthorized"
    yield "no token", b"GET /v1/target HTTP/1.1\r\nHost: x\r\n\r\n", "401 unauthorized"
    yield (
        "transport that is not offered",
        supervision(good, extra="Eagle-Target-Transport: x\r\n"),
        "409 transport-not-offered",
    )
    yield (
        "channel that is not open",
        supervision(good, extra="Eagle-Target-Transport: shm\r\nEagle-Target-Channel: x\r\n"),
        "409 unknown-channel",
    )
    yield (
        "shm hello of another host",
        request("POST", "/v1/transports/shm/channels", b'{"boot": "x"}'),
        "409 transport-refused",
    )
    yield "no HTTP at all", bytes(range(256)), "400"


def twice() -> bytes:
    """A mapping with one id two times."""
    mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    mask[3] = True
    parts = {"selected_token_ids": torch.tensor([3, 3]), "selected_token_mask": mask}
    return b"".join(encode_tensors(parts, {}))


def try_inputs(rounds: int, only: str = "") -> Iterator[tuple[str, str, Answers]]:
    """Send each so many times: what it was, the answer that is due, and those that came."""
    with faulty_server(**LIMITS) as server:
        put = request(
            "PUT", f"{messages.VOCAB_MAPPINGS}/{mapping_of().sha256}", b"".join(messages.encode_mapping(mapping_of()))
        )
        good = request_of([4, 9])
        expected = expected_of(good)
        for name, data, due in bad_inputs():
            if not re.search(only, name):
                continue
            answers = Answers()
            for _ in range(rounds):
                started = time.monotonic()
                answers.given[_describe(_send(server.url, data))] += 1
                answers.longest = max(answers.longest, time.monotonic() - started)
                _send(server.url, put)
                answer = _send(server.url, supervision(body_of(good)))
                if answer is not None and answer.status == 200:
                    with contextlib.suppress(AssertionError):
                        assert_same_tensors(answer.tensors()[0], expected)
                        answers.right += 1
            yield name, due, answers


def _send(url: str, data: bytes) -> Answer | None:
    with connected(url) as connection:
        # A server that refuses a body unread may hang up while it is still sent.
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        try:
            return read_answer(connection)
        except (ConnectionError, http.client.HTTPException):
            return None


def _describe(answer: Answer | None) -> str:
    if answer is None:
        return HUNG_UP
    try:
        problem = str(answer.json()["type"]).removeprefix(problems.URN)
    except (ValueError, KeyError, TypeError):
        return str(answer.status)
    return f"{answer.status} {problem}"
