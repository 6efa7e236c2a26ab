"""Clients apart: whose requests are whose, and that one who stops reading costs the others nothing."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.contract.request import SupervisionRequest
from eagle_target.protocol import messages
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import EmbeddingRunner
from tests.client.batches import assert_same_batch, expected_batch, rows_of
from tests.server.cases import TestRunner, mapping_of, request_of, wait_until
from tests.server.http import ask, assert_problem, body_of, connected, put_mapping

if TYPE_CHECKING:
    import socket
    from typing import Any

ANSWER_BYTES = 512 * (3 * 16 * 4 + 20_000 * 4 + 8)


def large_request() -> SupervisionRequest:
    """Answered with 40 MB by a target of 20 000 tokens, more than sockets buffer."""
    return SupervisionRequest(
        input_ids=torch.ones(512, dtype=torch.int64),
        seq_lens=(512,),
        row_mask=torch.ones(512, dtype=torch.bool),
        encoding="logits",
    )


def send_request(connection: socket.socket, request: SupervisionRequest, client: str) -> None:
    body = body_of(request)
    head = (
        f"POST {messages.SUPERVISION} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n"
        f"{messages.CLIENT}: {client}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)


def metric(url: str, name: str) -> float:
    lines = ask(url, "GET", messages.METRICS).body.decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


def test_a_client_that_stops_reading_holds_its_own_room_only() -> None:
    limit = 2 * ANSWER_BYTES
    with (
        loopback_server(
            lambda: EmbeddingRunner(vocab_size=20_000),
            send_timeout=120.0,
            max_client_outbox_bytes=limit,
            max_outbox_bytes=2 * limit,
        ) as server,
        contextlib.ExitStack() as running,
    ):
        stalled = [running.enter_context(connected(server.url)) for _ in range(3)]
        for connection in stalled:
            send_request(connection, large_request(), "stalled")
        # Two answers are in its outbox, and its third request waits for room.
        wait_until(lambda: metric(server.url, "eagle_target_outbox_bytes") == limit)
        wait_until(lambda: server.engine.waiting == 1)
        body = body_of(large_request())
        for _ in range(4):
            answer = ask(server.url, "POST", messages.SUPERVISION, body, {messages.CLIENT: "quick"})
            assert (answer.status, len(answer.body) > ANSWER_BYTES) == (200, True)
        assert server.engine.waiting == 1
        # It is gone, and its room comes back. tests/server/engine/test_live_answers.py has one that is dropped.
        for connection in stalled:
            connection.close()
        wait_until(lambda: metric(server.url, "eagle_target_outbox_bytes") == 0)
        assert server.engine.waiting == 0
        assert 2 * ANSWER_BYTES <= metric(server.url, "eagle_target_outbox_peak_bytes") <= 2 * limit


def test_an_answer_too_large_for_the_outbox_is_refused() -> None:
    with loopback_server(EmbeddingRunner, max_client_outbox_bytes=1000) as server:
        put_mapping(server.url, mapping_of())
        answer = ask(server.url, "POST", messages.SUPERVISION, body_of(request_of([60])))
        assert_problem(answer, 413, "answer-too-large", r"keeps 1000 for a client: .* max_client_outbox_bytes")
        assert ask(server.url, "POST", messages.SUPERVISION, body_of(request_of([2]))).status == 200


def test_each_target_of_a_program_is_a_client_of_its_own(monkeypatch: Any) -> None:
    with loopback_server(EmbeddingRunner) as server:
        clients: list[str] = []
        submit = server.engine.submit

        def watched(*arguments: Any, client: str) -> Any:
            clients.append(client)
            return submit(*arguments, client=client)

        monkeypatch.setattr(server.engine, "submit", watched)
        for _ in range(2):
            with RemoteEagle3TargetModel.from_urls([server.url], transport="wire", encoding="probs") as target:
                target.set_vocab_mapping(mapping_of())
                for _ in range(2):
                    assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
        ask(server.url, "POST", messages.SUPERVISION, body_of(request_of([2])))
    assert clients[0] == clients[1] != clients[2] == clients[3]
    assert clients[4] == "127.0.0.1"


def test_a_flood_over_http_leaves_another_its_turn() -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner, max_batch_tokens=1) as server, contextlib.ExitStack() as running:
        put_mapping(server.url, mapping_of())
        runner.gate.clear()
        flood = [running.enter_context(connected(server.url)) for _ in range(12)]
        for connection in flood:
            send_request(connection, request_of([4]), "flood")
        wait_until(lambda: runner.entered == 1 and server.engine.waiting == 11)
        other = running.enter_context(connected(server.url))
        send_request(other, request_of([5]), "other")
        wait_until(lambda: server.engine.waiting == 12)
        runner.gate.set()
        wait_until(lambda: len(runner.forwards) == 13)
    assert (5,) in runner.forwards[1:3]


def test_all_of_a_requests_time_is_told() -> None:
    with loopback_server(EmbeddingRunner) as server:
        put_mapping(server.url, mapping_of())
        answer = ask(server.url, "POST", messages.SUPERVISION, body_of(request_of([30])))
        assert answer.headers["server-timing"].count("dur=") == 3
        for stage in ("queue", "forward", "projection", "send"):
            name = f'eagle_target_stage_seconds_count{{stage="{stage}"}}'
            wait_until(lambda name=name: metric(server.url, name) == 1)  # type: ignore[misc]
        assert metric(server.url, "eagle_target_padded_tokens_total") == 0
