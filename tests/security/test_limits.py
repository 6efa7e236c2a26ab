"""Every limit of a server is held, told as a problem of its own, and the server goes on."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from eagle_target.protocol import messages
from eagle_target.protocol.tensors import encode_tensors
from eagle_target.testing.server import loopback_server
from tests.server.cases import mapping_of, request_of
from tests.server.http import (
    ask,
    assert_problem,
    body_of,
    connected,
    head_of,
    put_mapping,
    read_answer,
    read_until_closed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.server.run import HttpServer

LIMITS: dict[str, Any] = {
    "max_request_tokens": 64,
    "max_sequence_tokens": 32,
    "max_sequences": 4,
    "max_body_bytes": 2048,
    "max_headers": 16,
    "max_header_bytes": 1024,
    "max_mapping_bytes": 1024,
    "max_connections": 8,
    "headers_timeout": 1.0,
    "body_timeout": 1.0,
}


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with loopback_server(**LIMITS) as server:
        yield server


@pytest.fixture(autouse=True)
def goes_on(server: HttpServer) -> Iterator[None]:
    yield
    put_mapping(server.url, mapping_of())
    assert ask(server.url, "POST", messages.SUPERVISION, body_of(request_of([5, 7]))).status == 200


@pytest.mark.parametrize(
    ("seq_lens", "name"),
    [([20, 20, 25], "too-many-tokens"), ([1] * 5, "too-many-sequences"), ([33], "sequence-too-long")],
)
def test_requests_that_are_too_much(server: HttpServer, seq_lens: list[int], name: str) -> None:
    put_mapping(server.url, mapping_of())
    answer = ask(server.url, "POST", messages.SUPERVISION, body_of(request_of(seq_lens)))
    assert_problem(answer, 413, name, "this server takes .* raise max_")


@pytest.mark.parametrize(
    ("method", "path", "length", "name"),
    [
        ("POST", messages.SUPERVISION, 2049, "body-too-large"),
        ("POST", messages.SUPERVISION, 10**18, "body-too-large"),
        ("POST", messages.LM_HEAD, 2049, "body-too-large"),
        ("PUT", f"{messages.VOCAB_MAPPINGS}/x", 1025, "mapping-too-large"),
        ("POST", f"{messages.TRANSPORTS}/inprocess/channels", 1 << 17, "body-too-large"),
    ],
)
def test_a_body_that_is_too_large_is_refused_unread(
    server: HttpServer, method: str, path: str, length: int, name: str
) -> None:
    with connected(server.url) as connection:
        connection.sendall(head_of(path, length, method))
        assert_problem(read_answer(connection), 413, name, "this server takes")
        assert not read_until_closed(connection)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nA: " + b"x" * 1100 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nA: " + b"x" * 1100,
        b"GET /" + b"x" * 1100,
        b"GET /" + b"x" * 1100 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"A: x\r\n" * 20 + b"\r\n",
        b"GET /health HTTP/1.1\r\n" + b"A: x\r\n" * 20,
    ],
)
@pytest.mark.parametrize("piece", [1 << 16, 97])
def test_headers_that_are_too_much(server: HttpServer, head: bytes, piece: int) -> None:
    with connected(server.url) as connection:
        for start in range(0, len(head), piece):
            with contextlib.suppress(OSError):
                connection.sendall(head[start : start + piece])
        assert_problem(read_answer(connection), 431, "headers-too-large", "16 headers of 1024 bytes")


def test_headers_just_within_the_limits_are_taken_in_pieces(server: HttpServer) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 900 + b"\r\n\r\n"
    with connected(server.url) as connection:
        for _ in range(3):
            for start in range(0, len(head), 350):
                connection.sendall(head[start : start + 350])
                time.sleep(0.01)
            assert read_answer(connection).status == 200


def test_headers_behind_a_chunked_body_count(server: HttpServer) -> None:
    head = b"POST /v1/supervision HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    with connected(server.url) as connection, contextlib.suppress(OSError):
        connection.sendall(head)
        connection.sendall(b"A: x\r\n" * 1000)
        assert b"too-many" not in read_until_closed(connection)


def test_connections_past_the_limit_are_told(server: HttpServer) -> None:
    with contextlib.ExitStack() as open_ones:
        for _ in range(LIMITS["max_connections"]):
            connection = open_ones.enter_context(connected(server.url))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_answer(connection).status == 200
        with connected(server.url) as one_more:
            answer = read_answer(one_more)
            assert_problem(answer, 503, "too-many-connections", "holds 8 connections", retry_after="1")
            assert not read_until_closed(one_more)


@pytest.mark.parametrize(
    ("drip", "times"),
    [(b"", 0), (b"GET /health HTTP/1.1\r\nA: ", 1), (b"POST /health HTTP/1.1\r\nContent-Length: 9\r\n\r\n", 1)],
)
def test_a_slow_loris_is_cut_off(server: HttpServer, drip: bytes, times: int) -> None:
    with connected(server.url) as connection:
        connection.sendall(drip * times)
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 30:
                connection.sendall(b"x" if b"A: " in drip else b"")
                connection.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1 << 16):
                        break
        assert time.monotonic() - started < 20


def test_a_body_that_drips_is_told(server: HttpServer) -> None:
    with connected(server.url) as connection:
        connection.sendall(head_of(messages.SUPERVISION, 500) + b"x")
        assert_problem(read_answer(connection), 408, "body-timeout", "1 of 500 bytes")


def test_a_body_cut_short_disturbs_nobody(server: HttpServer) -> None:
    body = body_of(request_of([4]))
    with connected(server.url) as connection:
        connection.sendall(head_of(messages.SUPERVISION, len(body)) + body[:-1])
    with connected(server.url) as connection:
        connection.sendall(head_of(messages.SUPERVISION, len(body) - 3) + body)
        assert read_answer(connection).status == 400


@pytest.mark.parametrize("length", ["-1", "1e3", "+5", "0x10", "9" * 40, "9" * 900, "5, 6", "\u0665"])
def test_a_content_length_that_is_none(server: HttpServer, length: str) -> None:
    head = f"POST {messages.SUPERVISION} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode()
    with connected(server.url) as connection:
        connection.sendall(head)
        connection.settimeout(10)
        assert b" 400 " in read_until_closed(connection).split(b"\r\n")[0]


def lying(**entry: Any) -> bytes:
    text = json.dumps({"input_ids": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


@pytest.mark.parametrize(
    "body",
    [
        lying(shape=[1 << 40]),
        lying(shape=[-2]),
        lying(shape=[2.0]),
        lying(shape=[float("nan")]),
        lying(data_offsets=[0, 1 << 60]),
        lying(data_offsets=[-16, 0]),
        lying(data_offsets=[8, 24]),
        lying(data_offsets=[0, float("inf")]),
        lying(dtype="Q9"),
        (1 << 62).to_bytes(8, "little") + b"{}",
        b"\xff" * 64,
        b"[" * 1000,
        b"",
    ],
)
def test_safetensors_headers_that_lie(server: HttpServer, body: bytes) -> None:
    assert_problem(ask(server.url, "POST", messages.SUPERVISION, body), 400, "malformed-body", ".")


@pytest.mark.parametrize("value", [-1, 211, 1 << 62, -(1 << 63)])
def test_ids_out_of_range(server: HttpServer, value: int) -> None:
    put_mapping(server.url, mapping_of())
    tensors = {"input_ids": torch.tensor([1, value, 2]), "seq_lens": torch.tensor([3])}
    body = b"".join(encode_tensors(tensors, {"vocab_mapping": mapping_of().sha256}))
    assert_problem(ask(server.url, "POST", messages.SUPERVISION, body), 422, "contract", "input_ids")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_floats_are_no_ids(server: HttpServer, value: float) -> None:
    body = b"".join(encode_tensors({"input_ids": torch.tensor([value]), "seq_lens": torch.tensor([1])}, {}))
    assert_problem(ask(server.url, "POST", messages.SUPERVISION, body), 422, "contract", "int64 vector")


@pytest.mark.parametrize("text", [b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 5000])
def test_what_is_no_json_is_refused(server: HttpServer, text: bytes) -> None:
    answer = ask(server.url, "POST", f"{messages.TRANSPORTS}/inprocess/channels", text)
    assert_problem(answer, 400, "malformed-body", "is not JSON")
