"""Which clients count as connected, over whatever transport."""

from __future__ import annotations

import os
import signal
import sys
from subprocess import DEVNULL, Popen
from typing import TYPE_CHECKING

import pytest

from eagle_target.client import lease as client_presence
from eagle_target.client.http import ServerConnection
from eagle_target.client.lease import Lease
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.protocol import messages
from eagle_target.server import clients
from eagle_target.server.clients import Presences
from eagle_target.testing.server import loopback_server
from tests.client.batches import rows_of
from tests.client.stub import Received, stub
from tests.server.cases import TestRunner, mapping_of, request_of, wait_until
from tests.server.http import ask, body_of, put_mapping

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from eagle_target.server.run import HttpServer

LEASE_SECONDS = 1.2
CLIENT = """
import sys, time
from eagle_target import RemoteEagle3TargetModel
target = RemoteEagle3TargetModel.from_urls([sys.argv[1]])
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def early_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_presence, "FIRST_PAUSE_SECONDS", 0.05)


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with loopback_server(channel_lease=LEASE_SECONDS) as server:
        put_mapping(server.url, mapping_of())
        yield server


@pytest.mark.parametrize("transport", ["wire", "shm", "inprocess"])
def test_a_client_is_there_until_it_closes(server: HttpServer, transport: str) -> None:
    with RemoteEagle3TargetModel.from_urls([server.url], transport=transport, encoding="probs") as target:
        target.set_vocab_mapping(mapping_of())
        tokens = sum(int(rows_of(seed)["attention_mask"].sum()) for seed in range(3))
        for seed in range(3):
            target.generate_batch(**rows_of(seed))
        (client,) = server.engine.connected_clients()
        assert (client.address, client.requests, client.tokens) == ("127.0.0.1", 3, tokens)
        assert client.transport == transport
        assert len(client.id) == clients.SHOWN_LETTERS
        assert client.since <= client.last_seen
        metrics = ask(server.url, "GET", messages.METRICS).body.decode()
        assert "eagle_target_connected_clients 1.0" in metrics
    assert server.engine.connected_clients() == []


def test_a_client_that_asks_for_nothing_stays_longer_than_its_lease(server: HttpServer) -> None:
    with RemoteEagle3TargetModel.from_urls([server.url], transport="wire"):
        (before,) = server.engine.connected_clients()
        wait_until(lambda: server.engine.connected_clients()[0].last_seen > before.last_seen + 2 * LEASE_SECONDS)
        assert [client.since for client in server.engine.connected_clients()] == [before.since]


def test_a_client_that_is_killed_is_gone_after_its_lease(server: HttpServer) -> None:
    process = Popen([sys.executable, "-c", CLIENT, server.url], stdout=DEVNULL)
    try:
        wait_until(server.engine.connected_clients)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_until(lambda: not server.engine.connected_clients())


def test_probes_and_passers_by_are_no_clients(server: HttpServer) -> None:
    for path in (messages.HEALTH, messages.READY, messages.METRICS, messages.TARGET):
        ask(server.url, "GET", path)
    ask(server.url, "GET", messages.METRICS, headers={messages.CLIENT: "scraper"})
    assert server.engine.connected_clients() == []
    assert ask(server.url, "GET", messages.TARGET, headers={messages.CLIENT: "trainer"}).status == 200
    assert [client.id for client in server.engine.connected_clients()] == ["trainer"]


def test_without_an_id_the_address_counts(server: HttpServer) -> None:
    assert ask(server.url, "POST", messages.SUPERVISION, body_of(request_of([4]))).status == 200
    (client,) = server.engine.connected_clients()
    assert (client.id, client.requests, client.tokens, client.transport) == ("127.0.0.1", 1, 4, "wire")
    wait_until(lambda: not server.engine.connected_clients())


def test_presence_with_any_program(server: HttpServer) -> None:
    path = f"{messages.CLIENTS}/my-trainer-0123"
    answer = ask(server.url, "PUT", path)
    assert (answer.status, answer.json()) == (200, {"lease_seconds": LEASE_SECONDS})
    assert [client.id for client in server.engine.connected_clients()] == ["my-train"]
    assert ask(server.url, "DELETE", path, headers={messages.CLIENT: "my-trainer-0123"}).status == 204
    assert ask(server.url, "DELETE", path).status == 204
    assert server.engine.connected_clients() == []


def test_what_a_client_has_under_way_keeps_it_there_beyond_its_lease_and_its_leave() -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner, channel_lease=LEASE_SECONDS) as server:
        target = RemoteEagle3TargetModel.from_urls([server.url], transport="wire", encoding="logits")
        presences = server.engine.clients
        with presences.request("other", "10.0.0.1"):
            presences.leave("other")
            assert presences.count() == 2
        assert presences.count() == 1
        runner.gate.clear()
        handle = target.generate_batch_async(**rows_of())
        wait_until(lambda: runner.entered)
        runner.gate.set()
        handle.result(30)
        target.close()
        assert presences.count() == 0


def test_leases_and_leaves() -> None:
    presences = Presences(lease=0.5)
    with presences.request("a", "10.0.0.1"):
        wait_until(lambda: presences.connected()[0].last_seen > presences.connected()[0].since + 0.8)
    presences.hear("b", "10.0.0.2")
    assert presences.most_at_a_time == 2
    wait_until(lambda: presences.count() == 0)
    presences.leave("b")
    with presences.request("b", "10.0.0.2", connects=False):
        assert presences.count() == 0
    presences.supervised("b", tokens=1, transport="wire")
    assert presences.most_at_a_time == 2


def test_a_flood_of_names_costs_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MAX_CLIENTS", 3)
    presences = Presences(lease=60.0)
    for number in range(10):
        presences.hear(f"client-{number}", "10.0.0.1")
    assert [client.id for client in presences.connected()] == ["client-7", "client-8", "client-9"]


def test_an_older_server_is_asked_once() -> None:
    def respond(request: Received, connection: socket.socket) -> bool:
        body = b'{"type": "urn:eagle-target:problem:not-found", "status": 404}'
        head = f"HTTP/1.1 404 x\r\nContent-Type: application/problem+json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return True

    with stub(respond) as server:
        connection = ServerConnection(server.url, timeout=5.0, max_connections=1, client_id="a/b")
        lease = Lease(connection)
        lease.begin()
        wait_until(lambda: len(server.received) == 1)
        lease.end()
        lease.end()
        connection.close()
        assert [(request.method, request.path) for request in server.received] == [("PUT", "/v1/clients/a%2Fb")]
