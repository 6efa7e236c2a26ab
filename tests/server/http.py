"""A bare HTTP client: what any program may send."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from eagle_target.protocol import messages
from eagle_target.protocol.tensors import decode_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.vocab_mapping import VocabMapping

TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return decode_tensors(memoryview(bytearray(self.body)))


def ask(
    url: str, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """One request on a connection of its own."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=TIMEOUT_SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.getheaders()), answer.read())


@contextlib.contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), parts.port), timeout=TIMEOUT_SECONDS) as connection:
        yield connection


def read_answer(connection: socket.socket) -> Answer:
    """Read one answer from a socket; the connection may go on afterwards."""
    response = http.client.HTTPResponse(connection)
    with contextlib.closing(response):
        response.begin()
        return Answer(response.status, dict(response.getheaders()), response.read())


def read_until_closed(connection: socket.socket) -> bytes:
    """Everything until the peer closes the connection, however it does."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            received += part
    return bytes(received)


def body_of(request: SupervisionRequest) -> bytes:
    return b"".join(messages.encode_request(request))


def put_mapping(url: str, mapping: VocabMapping) -> None:
    body = b"".join(messages.encode_mapping(mapping))
    assert ask(url, "PUT", f"{messages.VOCAB_MAPPINGS}/{mapping.sha256}", body).status == 204


def head_of(path: str, length: int, method: str = "POST") -> bytes:
    """Request line and headers of a request with a body."""
    return f"{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n".encode()


def assert_problem(answer: Answer, status: int, name: str, detail: str, *, retry_after: str | None = None) -> None:
    """An RFC 9457 problem of this status and type whose detail matches."""
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert (answer.status, document["status"], document["type"]) == (status, status, f"urn:eagle-target:problem:{name}")
    assert document["title"] == name.replace("-", " ")
    assert re.search(detail, document["detail"]), document["detail"]
    assert answer.headers.get("retry-after") == retry_after
    assert ("retry_after" in document) == (retry_after is not None)
