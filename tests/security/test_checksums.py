"""What was changed on its way, there or back, is asked for again, and no answer to another request gets through."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import xxhash

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.errors import ProtocolError, TransportError
from eagle_target.plugins.registry import load_plugins
from eagle_target.protocol import messages
from eagle_target.testing.comparison import assert_same_batch
from eagle_target.testing.server import loopback_server
from tests.client.batches import expected_batch, rows_of
from tests.client.stub import Received, forwarding
from tests.server.cases import mapping_of, request_of
from tests.server.http import Answer, ask, body_of, put_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.plugins.transport import ClientChannel
    from eagle_target.server.run import HttpServer

ASKED = {messages.WANT_CHECKSUM: messages.CHECKSUM_NAME}


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with loopback_server() as server:
        yield server


def flipped(answer: Answer, position: int) -> Answer:
    body = bytearray(answer.body)
    body[position] ^= 1
    return replace(answer, body=bytes(body))


def with_flipped_bit(request: Received, position: int) -> Received:
    body = bytearray(request.body)
    body[position] ^= 1
    return replace(request, body=bytes(body))


@pytest.mark.parametrize("position", [-1, -500, -1000])
def test_a_flipped_bit_is_asked_for_again(server: HttpServer, position: int) -> None:
    faults = [position]

    def change(request: Received, answer: Answer) -> Answer:
        if request.path != messages.SUPERVISION or not faults:
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


# A bit of the last token id's, of a mask's byte, and of the header.
@pytest.mark.parametrize("position", [20, -1, -40])
@pytest.mark.parametrize("transport", ["wire", "shm", "nccl"])
def test_a_flipped_bit_in_a_request_is_asked_for_again(server: HttpServer, transport: str, position: int) -> None:
    faults = [position]

    def change(request: Received) -> Received:
        return with_flipped_bit(request, faults.pop()) if request.path == messages.SUPERVISION and faults else request

    with (
        forwarding(server.url, change_request=change) as line,
        RemoteEagle3TargetModel.from_urls([line.url], transport=transport, encoding="probs") as target,
    ):
        target.set_vocab_mapping(mapping_of())
        assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
        assert not faults
        assert target.model_info()["traffic"]["retries"] == 1


@pytest.mark.parametrize("path", [messages.LM_HEAD, messages.VOCAB_MAPPINGS, messages.TRANSPORTS])
def test_no_body_that_changed_on_its_way_is_taken(server: HttpServer, path: str) -> None:
    def change(request: Received) -> Received:
        return with_flipped_bit(request, -1) if request.path.startswith(path) and request.body else request

    def ask_for_a_batch(url: str) -> None:
        with RemoteEagle3TargetModel.from_urls([url], transport="shm", encoding="hidden", max_retries=0) as target:
            target.set_vocab_mapping(mapping_of())
            target.generate_batch(**rows_of())

    with (
        forwarding(server.url, change_request=change) as line,
        pytest.raises(TransportError, match="it changed on its way"),
    ):
        ask_for_a_batch(line.url)


# Somebody between client and server who sees to it that checksums fit, or a server that mixes its requests up.
@pytest.mark.parametrize("change", ["ids", "lengths", "rows", "probs_dtype", "mapping"])
def test_an_answer_to_another_request_is_not_taken(server: HttpServer, change: str) -> None:
    put_mapping(server.url, mapping_of(seed=1))

    def answer_another(request: Received) -> Received:
        if request.path != messages.SUPERVISION:
            return request
        body = body_of(changed_request(messages.decode_request(memoryview(bytearray(request.body)), find), change))
        return replace(
            request,
            headers={
                **request.headers,
                messages.CHECKSUM: messages.checksum_of([body]),
                "Content-Length": str(len(body)),
            },
            body=body,
        )

    def find(sha256: str) -> VocabMapping:
        assert sha256 == mapping_of().sha256
        return mapping_of()

    with (
        forwarding(server.url, change_request=answer_another) as line,
        RemoteEagle3TargetModel.from_urls([line.url], transport="wire", encoding="probs", max_retries=0) as target,
    ):
        target.set_vocab_mapping(mapping_of())
        with pytest.raises(ProtocolError, match=f"answered with {messages.ANSWERED} "):
            target.generate_batch(**rows_of())


def changed_request(request: SupervisionRequest, change: str) -> SupervisionRequest:
    match change:
        case "ids":
            return replace(request, input_ids=request.input_ids.flip(0))
        case "lengths":
            return replace(request, seq_lens=(1, request.tokens - 1))
        case "rows":
            return replace(request, row_mask=~request.row_mask)
        case "probs_dtype":
            return replace(request, probs_dtype=torch.bfloat16)
        case _:
            return replace(request, mapping=mapping_of(seed=1))


@pytest.mark.parametrize("path", [messages.LM_HEAD, messages.INPUT_EMBEDDINGS])
@pytest.mark.parametrize("name", [messages.REQUEST_ID, messages.ANSWERED, messages.FINGERPRINT])
def test_weights_of_another_answer_are_not_taken(server: HttpServer, path: str, name: str) -> None:
    def cross(request: Received, answer: Answer) -> Answer:
        if request.path != path:
            return answer
        headers = {key: value for key, value in answer.headers.items() if key.lower() != name.lower()}
        return replace(answer, headers={**headers, name: "another's"})

    def ask_for_weights(url: str) -> None:
        with RemoteEagle3TargetModel.from_urls([url], transport="wire", encoding="hidden", max_retries=0) as target:
            if path == messages.INPUT_EMBEDDINGS:
                target.input_embedding_weight()
            target.set_vocab_mapping(mapping_of())

    with (
        forwarding(server.url, cross) as line,
        pytest.raises(ProtocolError, match=f'answered with {name} "another\'s"'),
    ):
        ask_for_weights(line.url)


def test_a_flipped_bit_in_the_handshake_is_found(server: HttpServer) -> None:
    def change(request: Received, answer: Answer) -> Answer:
        return flipped(answer, -3) if request.path == messages.TARGET else answer

    with forwarding(server.url, change) as line, pytest.raises(ProtocolError, match="it changed on its way"):
        RemoteEagle3TargetModel.from_urls([line.url], transport="wire", max_retries=0)


def test_a_line_that_always_changes_bits_is_an_error(server: HttpServer) -> None:
    def change(request: Received, answer: Answer) -> Answer:
        return flipped(answer, -1) if request.path == messages.SUPERVISION else answer

    with (
        forwarding(server.url, change) as line,
        RemoteEagle3TargetModel.from_urls([line.url], transport="wire", encoding="probs", max_retries=1) as target,
    ):
        target.set_vocab_mapping(mapping_of())
        with pytest.raises(ProtocolError, match="it changed on its way"):
            target.generate_batch(**rows_of())


def test_an_embedding_that_changed_is_no_embedding(server: HttpServer) -> None:
    def change(request: Received, answer: Answer) -> Answer:
        return flipped(answer, -1) if request.path == messages.INPUT_EMBEDDINGS else answer

    with (
        forwarding(server.url, change) as line,
        RemoteEagle3TargetModel.from_urls([line.url], max_retries=0) as target,
        pytest.raises(ProtocolError, match="it changed on its way"),
    ):
        target.input_embedding_weight()


def test_a_checksum_is_sent_to_who_asks_for_one(server: HttpServer) -> None:
    put_mapping(server.url, mapping_of())
    body = body_of(request_of([5]))
    plain = ask(server.url, "POST", messages.SUPERVISION, body)
    checked = ask(server.url, "POST", messages.SUPERVISION, body, ASKED)

    assert messages.CHECKSUM.lower() not in plain.headers
    assert checked.headers[messages.CHECKSUM.lower()] == f"xxh3_64={xxhash.xxh3_64_hexdigest(checked.body)}"


def test_a_client_can_do_without(server: HttpServer) -> None:
    asked = []

    def note(request: Received, answer: Answer) -> Answer:
        asked.append(messages.WANT_CHECKSUM.lower() in {name.lower() for name in request.headers})
        return answer

    with (
        forwarding(server.url, note) as line,
        RemoteEagle3TargetModel.from_urls([line.url], transport="wire", encoding="probs", checksum=False) as target,
    ):
        target.set_vocab_mapping(mapping_of())
        assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
    assert not any(asked)


@pytest.mark.parametrize("name", [messages.REQUEST_ID, messages.ANSWERED, messages.FINGERPRINT, messages.MAPPING])
@pytest.mark.parametrize("transport", ["wire", "inprocess", "shm"])
def test_what_came_with_the_tensors_is_compared(
    server: HttpServer, transport: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = load_plugins().transports.get(transport)
    connect, changed = used.connect, dict[str, str]()

    def connect_and_change(*arguments: Any) -> ClientChannel:
        channel = connect(*arguments)
        receive = channel.receive
        monkeypatch.setattr(channel, "receive", lambda body, sink: {**receive(body, sink), **changed})
        return channel

    monkeypatch.setattr(used, "connect", connect_and_change)
    with RemoteEagle3TargetModel.from_urls(
        [server.url], transport=transport, encoding="probs", max_retries=0
    ) as target:
        target.set_vocab_mapping(mapping_of())
        target.generate_batch(**rows_of())
        changed[name] = "another's"
        with pytest.raises(ProtocolError, match=f'answered with {name} "another\'s"'):
            target.generate_batch(**rows_of())
