"""Tickets, hellos and messages of channels, and the doorway of `shm`: each may come from a peer that is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_inprocess.transport import CONTENT_TYPE as SHELF_TYPE
from eagle_target_inprocess.transport import InProcessClientChannel, Shelf
from eagle_target_nccl.layout import CONTENT_TYPE as NCCL_TYPE
from eagle_target_nccl.layout import decode_ticket, encode_ticket
from eagle_target_shm.doorway import ADDRESS, CLIENT, Invitation
from eagle_target_shm.hosts import this_host
from eagle_target_shm.tickets import CONTENT_TYPE as SHM_TYPE
from eagle_target_shm.tickets import Place, Ticket, read_ticket
from hypothesis import example, given
from hypothesis import strategies as st

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.contract.sinks import PackedTensors
from eagle_target.protocol import messages
from eagle_target.seals import NONCE_BYTES, SEAL_BYTES
from eagle_target.testing.comparison import assert_same_batch
from eagle_target.testing.server import loopback_server
from eagle_target.testing.transport_harness import MemoryBody
from tests.client.batches import expected_batch, rows_of
from tests.fuzz.budget import tries, tries_against_the_clock
from tests.fuzz.mutations import json_values, mutated, mutated_json, value_or_typed_error
from tests.server.cases import expected_of, mapping_of, request_of
from tests.server.http import ask

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from eagle_target.server.run import HttpServer

TENSORS = expected_of(request_of([3, 5]))
SIZES = {"host": 1 << 20}
TICKET = bytes(
    Ticket(
        [Place("a", torch.float32, (2, 3), "host", 1 << 16), Place("b", torch.int64, (0,), "host", 0)],
        {"host": 3},
        {"x": "y"},
    ).encode()
)
NCCL_TICKET = encode_ticket("t1", TENSORS, {"x": "y"})
# All that a channel's two ends say to each other, but for `pull`, which needs a transfer.
HELLOS: dict[str, dict[str, Any]] = {
    "nccl": {"backend": "tcp", "target_device": "cpu", "digest": "xxh3_128", "gpu": None},
    "shm": {**this_host(), "device": "cpu"},
    "inprocess": {"process": "1-2"},
    "wire": {},
}
MESSAGES: list[dict[str, Any]] = [{"join": True}, {"state": True}, {"pull": "t1", "number": 1, "cuts": [3, 4]}]
FINE = (200, 201, 204, 400, 409, 422, 500)


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    options = {"nccl": {"connect_timeout": 1.0}, "shm": {"max_bytes": 1 << 20, "max_total_bytes": 1 << 24}}
    transports = ("wire", "shm", "nccl", "inprocess")
    with loopback_server(transports=transports, transport_options=options, channel_lease=5.0) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def goes_on(server: HttpServer) -> Iterator[None]:
    """A client that was there before is served after it all."""
    with contextlib.ExitStack() as running:
        clients = [
            running.enter_context(RemoteEagle3TargetModel.from_urls([server.url], transport=name, encoding="probs"))
            for name in HELLOS
        ]
        for target in clients:
            target.set_vocab_mapping(mapping_of())
        yield
        for target in clients:
            assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
            assert target.model_info()["servers"][0]["fallbacks"] == 0


@tries(3)
@given(mutated(TICKET) | mutated_json(json.loads(TICKET)).map(lambda content: json.dumps(content).encode()))
@example(b"[" * 100_000)
@example(TICKET.replace(b"65536", b"1" * 5000))
def test_a_ticket_of_shm(data: bytes) -> None:
    def read() -> None:
        for place in read_ticket(MemoryBody(SHM_TYPE, data), SIZES).places:
            # What is taken for right lies in the memory.
            assert not place.size or 0 <= place.offset <= SIZES[place.memory] - place.size
            assert place.size >= 0

    value_or_typed_error(read)


@tries(3)
@given(mutated(NCCL_TICKET) | mutated_json(json.loads(NCCL_TICKET)).map(lambda content: json.dumps(content).encode()))
@example(b"[" * 100_000)
@example(json.dumps({"transfer": "t", "header": "[" * 100_000, "failure": None}).encode())
@example(json.dumps({"transfer": "t", "header": "\ud800", "failure": None}).encode())
def test_a_ticket_of_nccl(data: bytes) -> None:
    value_or_typed_error(lambda: decode_ticket(NCCL_TYPE, data).header.data_bytes)


@tries(4)
@given(mutated(b'{"transfer_id": "t1"}'), st.sampled_from([SHELF_TYPE, "text/plain"]))
@example(b'{"transfer_id": "t1"}', SHELF_TYPE)
@example(b"[" * 4000, SHELF_TYPE)
def test_a_ticket_of_inprocess(data: bytes, content_type: str) -> None:
    shelf = Shelf()
    shelf.lay("t1", (TENSORS, {}))
    value_or_typed_error(lambda: InProcessClientChannel(shelf).receive(MemoryBody(content_type, data), PackedTensors()))


def check_answer(status: int, body: bytes) -> dict[str, Any]:
    """An answer that is one of ours, and no surprise to the server."""
    assert status in FINE, (status, body)
    assert b"problem:internal" not in body, body
    content: dict[str, Any] = json.loads(body) if body else {}
    return content


@tries_against_the_clock(2)
@given(st.sampled_from(sorted(HELLOS)), st.data())
def test_a_hello(server: HttpServer, transport: str, data: st.DataObject) -> None:
    content = data.draw(mutated_json(HELLOS[transport]) | st.dictionaries(st.text(max_size=5), json_values()))
    path = f"{messages.TRANSPORTS}/{transport}/channels"
    answer = ask(server.url, "POST", path, json.dumps(content).encode())
    opened = check_answer(answer.status, answer.body)
    if answer.status == 201:
        assert ask(server.url, "DELETE", f"{path}/{opened['channel']}").status == 204


@contextlib.contextmanager
def channel(server: HttpServer, transport: str, hello: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    path = f"{messages.TRANSPORTS}/{transport}/channels"
    answer = ask(server.url, "POST", path, json.dumps(hello).encode())
    assert answer.status == 201, answer.body
    opened = answer.json()
    try:
        yield f"{path}/{opened['channel']}", opened
    finally:
        assert ask(server.url, "DELETE", f"{path}/{opened['channel']}").status == 204


@tries_against_the_clock(0.5)
@given(st.sampled_from(["nccl", "shm", "wire"]), st.lists(st.sampled_from(MESSAGES).flatmap(mutated_json), max_size=3))
@example("nccl", [{"pull": [], "number": 1, "cuts": [True]}, {"join": True}, {"join": True}])
def test_messages(server: HttpServer, transport: str, messages: list[dict[str, Any]]) -> None:
    with channel(server, transport, HELLOS[transport]) as (path, _):
        for message in messages:
            answer = ask(server.url, "POST", f"{path}/messages", json.dumps(message).encode())
            check_answer(answer.status, answer.body)


@tries_against_the_clock(2)
@given(
    st.booleans(),
    st.lists(
        st.binary(max_size=40) | st.sampled_from([b"\xff" * 8, bytes(8), (1 << 40).to_bytes(8, "little")]), max_size=3
    ),
)
def test_what_is_said_at_the_doorway_of_shm(server: HttpServer, is_expected: bool, said: list[bytes]) -> None:
    offer = ask(server.url, "GET", messages.TARGET).json()["transports"]["shm"]
    with channel(server, "shm", HELLOS["shm"]) as (_, opened), doorway(offer["socket"]) as connection:
        if is_expected:
            invitation = Invitation(bytes.fromhex(opened["name"]), bytes.fromhex(opened["key"]))
            connection.send(invitation.name + bytes(NONCE_BYTES))
            theirs = connection.recv(NONCE_BYTES + SEAL_BYTES)[:NONCE_BYTES]
            connection.send(invitation.seal(CLIENT, offer["socket"], theirs, bytes(NONCE_BYTES)))
            _, descriptors, _, _ = socket.recv_fds(connection, 8, 1)
            for descriptor in descriptors:
                os.close(descriptor)
        with contextlib.suppress(OSError):
            for message in said:
                connection.send(message)


@contextlib.contextmanager
def doorway(name: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20.0)
        connection.connect(ADDRESS + name)
        yield connection
