"""An answer that was changed on its way is asked for again, and none of another request gets through."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import xxhash

from eagle_target import protocol
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.errors import ProtocolError
from eagle_target.testing.server import loopback_server
from tests.client.batches import assert_same_batch, expected_batch, rows_of
from tests.client.stub import Received, forwarding
from tests.server.cases import mapping_of, request_of
from tests.server.http import Answer, ask, body_of, put_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.server.serve import HttpServer

ASKED = {protocol.CHECKSUM: protocol.CHECKSUM_NAME}


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with loopback_server() as server:
        yield server


def flipped(answer: Answer, position: int) -> Answer:
    body = bytearray(answer.body)
    body[position] ^= 1
    return replace(answer, body=bytes(body))


@pytest.mark.parametrize("position", [-1, -500, -1000])
def test_a_flipped_bit_is_asked_for_again(server: HttpServer, position: int) -> None:
    faults = [position]

    def change(request: Received, answer: Answer) -> Answer:
        if request.path != protocol.SUPERVISION or not faults:
            return answer
        return flipped(answer, faults.pop())

    with (
        forwarding(server.url, change) as line,
        RemoteEagle3TargetModel.from_urls([line.url], transport="wire", encoding="probs") as target,
    ):
        target.set_vocab_mapping(mapping_of())
        assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
        assert not faults
        assert target.model_info()["traffic"]["retries"] == 1


def test_a_line_that_always_changes_bits_is_an_error(server: HttpServer) -> None:
    def change(request: Received, answer: Answer) -> Answer:
        return flipped(answer, -1) if request.path == protocol.SUPERVISION else answer

    with (
        forwarding(server.url, change) as line,
        RemoteEagle3TargetModel.from_urls([line.url], transport="wire", encoding="probs", max_retries=1) as target,
    ):
        target.set_vocab_mapping(mapping_of())
        with pytest.raises(ProtocolError, match="it changed on its way"):
            target.generate_batch(**rows_of())


def test_an_embedding_that_changed_is_no_embedding(server: HttpServer) -> None:
    def change(request: Received, answer: Answer) -> Answer:
        return flipped(answer, -1) if request.path == protocol.INPUT_EMBEDDINGS else answer

    with (
        forwarding(server.url, change) as line,
        RemoteEagle3TargetModel.from_urls([line.url], max_retries=0) as target,
        pytest.raises(ProtocolError, match="it changed on its way"),
    ):
        target.input_embedding_weight()


def test_a_checksum_is_sent_to_who_asks_for_one(server: HttpServer) -> None:
    put_mapping(server.url, mapping_of())
    body = body_of(request_of([5]))
    plain = ask(server.url, "POST", protocol.SUPERVISION, body)
    checked = ask(server.url, "POST", protocol.SUPERVISION, body, ASKED)

    assert protocol.CHECKSUM.lower() not in plain.headers
    assert checked.headers[protocol.CHECKSUM.lower()] == f"xxh3_64={xxhash.xxh3_64_hexdigest(checked.body)}"


def test_a_client_can_do_without(server: HttpServer) -> None:
    asked = []

    def note(request: Received, answer: Answer) -> Answer:
        asked.append(protocol.CHECKSUM.lower() in {name.lower() for name in request.headers})
        return answer

    with (
        forwarding(server.url, note) as line,
        RemoteEagle3TargetModel.from_urls([line.url], transport="wire", encoding="probs", checksum=False) as target,
    ):
        target.set_vocab_mapping(mapping_of())
        assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
    assert not any(asked)


@pytest.mark.parametrize("name", [protocol.REQUEST_ID, protocol.FINGERPRINT, protocol.MAPPING])
@pytest.mark.parametrize("transport", ["wire", "inprocess", "shm"])
def test_what_came_with_the_tensors_is_compared(
    server: HttpServer, transport: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RemoteEagle3TargetModel.from_urls(
        [server.url], transport=transport, encoding="probs", max_retries=0
    ) as target:
        target.set_vocab_mapping(mapping_of())
        target.generate_batch(**rows_of())
        agreement = target._dispatcher.standings[0].peer._agreement
        assert agreement is not None
        receive = agreement.channel.receive
        monkeypatch.setattr(agreement.channel, "receive", lambda body, sink: {**receive(body, sink), name: "another's"})
        with pytest.raises(ProtocolError, match=f'answered with {name} "another\'s"'):
            target.generate_batch(**rows_of())
