"""HTTP from a peer that is wrong: the server answers or hangs up; a client never takes a batch that is not its own."""

from __future__ import annotations

import http.client
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eagle_target.client import balancer
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.errors import EagleTargetError
from eagle_target.protocol import messages
from eagle_target.testing.comparison import assert_same_batch
from eagle_target.testing.server import loopback_server
from tests.client.batches import expected_batch, rows_of
from tests.client.stub import Received, Stub, encode, stub
from tests.fuzz.budget import tries_against_the_clock
from tests.fuzz.mutations import mutated
from tests.server.cases import mapping_of, request_of
from tests.server.http import ask, body_of, connected, put_mapping, read_answer

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from eagle_target.server.run import HttpServer

TOKEN = "t" * 32
LIMITS: dict[str, Any] = {"body_timeout": 0.05, "headers_timeout": 0.05, "max_body_bytes": 1 << 16, "token": TOKEN}
ROWS = rows_of()


def whole(method: str, path: str, body: bytes, headers: str = "") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def requests() -> list[bytes]:
    mapping = b"".join(messages.encode_mapping(mapping_of()))
    body = body_of(request_of([3, 5]))
    hello = json.dumps({"backend": "tcp", "target_device": "cpu", "digest": "xxh3_128"}).encode()
    extra = "Eagle-Target-Checksum: xxh3_64\r\nEagle-Target-Client: c\r\nEagle-Target-Transport: wire\r\n"
    return [
        whole("POST", messages.SUPERVISION, body, extra),
        whole("POST", messages.SUPERVISION, body, "Eagle-Target-Channel: x\r\nEagle-Target-Passed-Over: a,b\r\n"),
        whole("PUT", f"{messages.VOCAB_MAPPINGS}/{mapping_of().sha256}", mapping),
        whole("GET", f"{messages.VOCAB_MAPPINGS}/{mapping_of().sha256}", b""),
        whole("POST", messages.LM_HEAD, body),
        whole("GET", messages.TARGET, b""),
        whole("GET", messages.INPUT_EMBEDDINGS, b""),
        whole("GET", messages.METRICS, b""),
        whole("POST", f"{messages.TRANSPORTS}/wire/channels", hello),
        whole("POST", f"{messages.TRANSPORTS}/wire/channels/x/messages", hello),
        whole("DELETE", f"{messages.TRANSPORTS}/wire/channels/x", b""),
    ]


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with loopback_server(transports=("wire",), **LIMITS) as running:
        yield running


@tries_against_the_clock(4)
@given(mutated(*requests()))
@example(b"POST /v1/supervision HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n")
@example("POST /v1/supervision HTTP/1.1\r\nContent-Length: ٣\r\n\r\n".encode())
@example(whole("POST", messages.SUPERVISION, body_of(request_of([3])), "Transfer-Encoding: chunked\r\n"))
def test_a_request_to_a_server(server: HttpServer, data: bytes) -> None:
    with connected(server.url) as connection:
        try:
            connection.sendall(data)
            answer = read_answer(connection)
        except (ConnectionError, http.client.HTTPException):
            return  # hung up: what came was no whole request, in time
    assert b"problem:internal" not in answer.body, answer


def test_the_server_goes_on(server: HttpServer) -> None:
    answer = ask(server.url, "GET", messages.TARGET, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status == 200


class Changing:
    """A server between a client and a real one that answers supervision with other bytes."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.change: Callable[[bytes], bytes] = bytes

    def respond(self, request: Received, connection: socket.socket) -> bool:
        headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        data = encode(ask(self._url, request.method, request.path, request.body or None, headers))
        is_changed = request.path == messages.SUPERVISION
        connection.sendall(self.change(data) if is_changed else data)
        return not is_changed


@pytest.fixture(scope="module")
def changing() -> Iterator[tuple[Changing, Stub]]:
    with loopback_server() as running:
        put_mapping(running.url, mapping_of())
        line = Changing(running.url)
        with stub(line.respond) as between:
            yield line, between


@pytest.fixture(scope="module")
def target(changing: tuple[Changing, Stub]) -> Iterator[RemoteEagle3TargetModel]:
    with (
        pytest.MonkeyPatch.context() as patch,
        RemoteEagle3TargetModel.from_urls(
            [changing[1].url], transport="wire", encoding="probs", timeout=5.0, max_retries=0, retry_timeout=0.0
        ) as client,
    ):
        patch.setattr(balancer, "FIRST_PAUSE_SECONDS", 0.0)
        patch.setattr(balancer, "LONGEST_PAUSE_SECONDS", 0.0)
        client.set_vocab_mapping(mapping_of())
        yield client


@tries_against_the_clock(3)
@given(st.integers(0, 1 << 40))
def test_an_answer_to_a_client(changing: tuple[Changing, Stub], target: RemoteEagle3TargetModel, seed: int) -> None:
    """Whatever comes: the right batch, or an error of ours."""

    def change(answer: bytes) -> bytes:
        edits, changed = random.Random(seed), bytearray(answer)
        for _ in range(edits.randint(1, 3)):
            first = edits.randrange(min(len(changed), 700) if edits.random() < 0.6 else len(changed))
            last = min(first + edits.randint(1, 30), len(changed))
            match edits.choice(["flip", "flip", "cut", "drop", "insert", "number", "swap"]):
                case "flip":
                    changed[first] ^= 1 << edits.randint(0, 7)
                case "cut":
                    del changed[first + 1 :]
                case "drop":
                    del changed[first : max(last, 1)]
                case "insert":
                    changed[first:first] = edits.randbytes(8)
                case "number":
                    changed[first:last] = edits.choice(
                        [b"9" * 30, b"-1", b"1e9", b"\r\n\r\n", b"\r\nContent-Length: 3"]
                    )
                case _:
                    changed[first:last] = changed[first:last][::-1]
            if len(changed) < 2:
                break
        return bytes(changed)

    changing[0].change = change
    try:
        batch = target.generate_batch(**ROWS)
    except EagleTargetError:
        return
    assert_same_batch(batch, expected_batch(ROWS))
