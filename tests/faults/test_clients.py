"""Clients that die, stop reading, go away or talk nonsense, seen from the server and from other clients."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.contract.request import SupervisionRequest
from eagle_target.memory import trim_heap
from eagle_target.protocol import messages
from eagle_target.testing.comparison import assert_same_batch, assert_same_bits
from eagle_target.testing.server import loopback_server
from tests.client.batches import expected_batch, rows_of
from tests.faults.processes import LARGE, ServerUnderFault, faulty_server
from tests.server.cases import (
    PATIENCE_SECONDS,
    TestRunner,
    expected_of,
    mapping_of,
    request_of,
    wait_until,
)
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
    from pathlib import Path

ROUNDS = 5
# Two answers of the large server, and what the allocator keeps.
SLACK_BYTES = 64 << 20
# Sends what the file has, reads the start of the answer, and then nothing more.
CLIENT = """
import socket, sys, time
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(open(sys.argv[2], "rb").read())
connection.recv(100, socket.MSG_WAITALL)
print("reading", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def large_server() -> Iterator[ServerUnderFault]:
    with faulty_server(LARGE, send_timeout=1.0) as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[ServerUnderFault]:
    with faulty_server(max_body_bytes=1 << 20, body_timeout=5.0) as running:
        put_mapping(running.url, mapping_of())
        yield running


def large_request() -> bytes:
    """A whole HTTP request that is answered with 40 MB."""
    tokens = 512
    request = SupervisionRequest(
        input_ids=torch.ones(tokens, dtype=torch.int64),
        seq_lens=(tokens,),
        row_mask=torch.ones(tokens, dtype=torch.bool),
        encoding="logits",
    )
    body = body_of(request)
    return head_of(messages.SUPERVISION, len(body)) + body


def answers_others(server: ServerUnderFault) -> None:
    """Another client gets what it asks for."""
    with connected(server.url) as connection:
        connection.sendall(large_request())
        answer = read_answer(connection)
        assert (answer.status, answer.tensors()[0]["logits"].shape) == (200, (512, 20_000))


def test_a_client_killed_mid_response(large_server: ServerUnderFault, tmp_path: Path) -> None:
    request = tmp_path / "request"
    request.write_bytes(large_request())
    for _ in range(2):
        answers_others(large_server)
    wait_until(lambda: large_server.connections() == 0)
    rss, fds = large_server.rss(), large_server.fds()
    for _ in range(ROUNDS):
        command = [sys.executable, "-c", CLIENT, str(large_server.port), str(request)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"reading\n"
            wait_until(lambda: large_server.connections() == 1, "the end of connections but the client's")
            client.kill()
        answers_others(large_server)
    wait_until(lambda: large_server.connections() == 0, "the end of the dead clients' connections")
    wait_until(lambda: large_server.fds() <= fds)
    wait_until(lambda: large_server.rss() < rss + SLACK_BYTES, "the memory of the answers")
    assert large_server.is_ready()


def test_a_client_that_stops_reading_is_dropped(large_server: ServerUnderFault) -> None:
    answers_others(large_server)
    wait_until(lambda: large_server.connections() == 0)
    rss, fds = large_server.rss(), large_server.fds()
    with contextlib.ExitStack() as running:
        stalled = [running.enter_context(connected(large_server.url)) for _ in range(ROUNDS)]
        for connection in stalled:
            connection.sendall(large_request())
            connection.recv(100, socket.MSG_WAITALL)
        answers_others(large_server)
        assert large_server.is_ready()
        wait_until(lambda: large_server.connections() == 0, "the end of the connections nobody reads")
        wait_until(lambda: large_server.fds() <= fds)
        wait_until(lambda: large_server.rss() < rss + SLACK_BYTES, "the memory of the answers")
        for connection in stalled:
            assert len(read_until_closed(connection)) < 40_000_000
    answers_others(large_server)


def test_a_client_that_reads_slowly_gets_its_answer() -> None:
    """It takes three times what a send may take without a byte read, and reads some all the while."""
    patience, size = 1.0, 40_000_000
    with faulty_server(LARGE, send_timeout=patience) as slow_to, connected(slow_to.url) as connection:
        connection.sendall(large_request())
        received, began = 0, time.monotonic()
        while received < size:
            piece = connection.recv(1 << 20)
            assert piece, f"dropped after {received} bytes"
            received += len(piece)
            time.sleep(max(0.0, began + 3 * patience * received / size - time.monotonic()))


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_the_work_of_a_client_that_went_away_is_skipped(how: str) -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner, max_batch_tokens=1) as server, ThreadPoolExecutor(2) as pool:
        put_mapping(server.url, mapping_of())
        for number in range(ROUNDS):
            runner.gate.clear()
            entered = runner.entered
            first = pool.submit(ask, server.url, "POST", messages.SUPERVISION, body_of(request_of([3])))
            wait_until(lambda before=entered: runner.entered > before)  # type: ignore[misc]
            with connected(server.url) as connection:
                body = body_of(request_of([40 + number]))
                connection.sendall(head_of(messages.SUPERVISION, len(body)) + body)
                wait_until(lambda: server.engine.waiting == 1)
                if how == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if how == "half-close":
                    connection.shutdown(socket.SHUT_WR)
                    assert read_until_closed(connection) == b""
            gone = f'requests_total{{outcome="client-gone",status="499"}} {number + 1}.0'
            wait_until(lambda line=gone: line in ask(server.url, "GET", messages.METRICS).body.decode())  # type: ignore[misc]
            last = pool.submit(ask, server.url, "POST", messages.SUPERVISION, body_of(request_of([5])))
            wait_until(lambda: server.engine.waiting == 2)
            runner.gate.set()
            assert [first.result(PATIENCE_SECONDS).status, last.result(PATIENCE_SECONDS).status] == [200, 200]
    assert runner.forwards == [(3,), (5,)] * ROUNDS


def test_a_full_queue_is_an_error_for_one_and_a_wait_for_the_other() -> None:
    runner = TestRunner()
    with (
        loopback_server(lambda: runner, max_queue=1, max_batch_tokens=1) as server,
        RemoteEagle3TargetModel.from_urls([server.url], transport="wire", encoding="probs", max_retries=0) as target,
        ThreadPoolExecutor(2) as pool,
    ):
        target.set_vocab_mapping(mapping_of())
        runner.gate.clear()
        filling = [pool.submit(ask, server.url, "POST", messages.SUPERVISION, body_of(request_of([3])))]
        wait_until(lambda: runner.entered)
        filling.append(pool.submit(ask, server.url, "POST", messages.SUPERVISION, body_of(request_of([3]))))
        wait_until(lambda: server.engine.waiting == 1)
        answer = ask(server.url, "POST", messages.SUPERVISION, body_of(request_of([3])))
        assert_problem(answer, 503, "queue-full", "the queue holds 1", retry_after="1")
        batches = [target.generate_batch_async(**rows_of(seed)) for seed in range(3)]
        refused = 'requests_total{outcome="queue-full",status="503"} 1.0'
        wait_until(lambda: refused not in ask(server.url, "GET", messages.METRICS).body.decode(), "a second refusal")
        runner.gate.set()
        for seed, batch in enumerate(batches):
            assert_same_batch(batch.result(PATIENCE_SECONDS), expected_batch(rows_of(seed)))
        assert [future.result(PATIENCE_SECONDS).status for future in filling] == [200, 200]
        assert target.model_info()["traffic"]["retries"] == 0


def good(server: ServerUnderFault) -> None:
    request = request_of([4, 9])
    answer = ask(server.url, "POST", messages.SUPERVISION, body_of(request))
    assert_same_bits(answer.tensors()[0], expected_of(request))


@pytest.mark.parametrize("end", ["close", "reset", "half-close"])
@pytest.mark.parametrize("sent", [0, 10, 100_000])
def test_a_body_that_ends_early(server: ServerUnderFault, end: str, sent: int) -> None:
    good(server)
    wait_until(lambda: server.connections() == 0)
    fds = server.fds()
    for _ in range(ROUNDS):
        with connected(server.url) as connection:
            connection.sendall(head_of(messages.SUPERVISION, 1 << 20) + bytes(sent))
            if end == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if end == "half-close":
                connection.shutdown(socket.SHUT_WR)
                assert read_until_closed(connection) == b""
        good(server)
    wait_until(lambda: server.connections() == 0)
    wait_until(lambda: server.fds() <= fds)


def test_announcing_much_and_sending_nothing_takes_no_memory(server: ServerUnderFault) -> None:
    good(server)
    rss = server.rss()
    with contextlib.ExitStack() as running:
        for _ in range(100):
            connection = running.enter_context(connected(server.url))
            connection.sendall(head_of(messages.SUPERVISION, 1 << 20) + b"x")
        wait_until(lambda: server.connections() == 100)
        good(server)
        assert server.rss() - rss < 50 << 20
    wait_until(lambda: server.connections() == 0)


def test_bodies_and_requests_that_are_wrong(server: ServerUnderFault) -> None:
    good(server)
    wait_until(lambda: server.connections() == 0)
    fds = server.fds()
    random = torch.Generator().manual_seed(0)
    for number in range(20):
        garbage = bytes(torch.randint(0, 256, (10 + number * 50,), generator=random).tolist())
        with connected(server.url) as connection:
            connection.sendall(garbage + b"\r\n\r\n")
            assert read_until_closed(connection).startswith(b"HTTP/1.1 400")
        assert_problem(ask(server.url, "POST", messages.SUPERVISION, garbage), 400, "malformed-body", ".")
        body = bytearray(body_of(request_of([4])))
        body[number % len(body)] ^= 0xFF
        assert ask(server.url, "POST", messages.SUPERVISION, bytes(body)).status in (400, 409, 422)
    with connected(server.url) as connection:
        connection.sendall(head_of(messages.SUPERVISION, (1 << 20) + 1))
        assert_problem(read_answer(connection), 413, "body-too-large", "1048577")
    path = f"{messages.VOCAB_MAPPINGS}/{mapping_of(1).sha256}"
    wrong = b"".join(messages.encode_mapping(mapping_of(2)))
    assert_problem(ask(server.url, "PUT", path, wrong), 422, "invalid-vocab-mapping", "hash is")
    answer = ask(server.url, "POST", messages.SUPERVISION, body_of(request_of([4], mapping=mapping_of(1))))
    assert_problem(answer, 409, "unknown-vocab-mapping", "PUT it")
    good(server)
    wait_until(lambda: server.connections() == 0)
    wait_until(lambda: server.fds() <= fds)


def test_an_oversized_body_that_is_sent_all_the_same(server: ServerUnderFault) -> None:
    for _ in range(ROUNDS):
        with contextlib.suppress(ConnectionError), connected(server.url) as connection:
            connection.sendall(head_of(messages.SUPERVISION, 64 << 20))
            for _ in range(64):
                connection.sendall(bytes(1 << 20))
        good(server)
    wait_until(lambda: server.connections() == 0)


def test_two_hundred_batches_take_no_more_memory_than_fifty(server: ServerUnderFault) -> None:
    process = psutil.Process()
    with RemoteEagle3TargetModel.from_urls([server.url]) as target:
        target.set_vocab_mapping(mapping_of())

        def work(seeds: range) -> tuple[int, int]:
            items = (rows_of(seed, batch=16 + seed % 8, seq=250) for seed in seeds)
            for batch in target.prefetch(items, depth=3):
                assert batch.target_probs is not None
            trim_heap()
            return int(process.memory_info().rss), server.rss()

        ours, theirs = work(range(50))
        ours_later, _ = work(range(50, 250))
    assert ours_later - ours < 48 << 20
    wait_until(lambda: server.rss() - theirs < 48 << 20, "the memory of the answers")
