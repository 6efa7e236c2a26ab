"""Servers of transport `shm` that are killed, stopped or restarted, seen from their clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eagle_target.client import balancer
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import ConnectError
from eagle_target.testing.comparison import assert_same_batch, assert_same_bits
from eagle_target.testing.transport_harness import MemoryBody
from tests.client.batches import expected_batch, rows_of
from tests.faults.processes import LARGE, abandoned_memory, faulty_server
from tests.faults.shm_clients import connect, expected_answer, fetch, large_request
from tests.server.cases import mapping_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.testing.transport_harness import ServerClient

ROUNDS = 20
# Of what needs a server that starts again.
STARTS = 4


def fetch_while(client: ServerClient, happens: Callable[[], object]) -> PackedTensors:
    """Something happens between the arrival of the ticket and the first look at the memory that it names."""
    received = PackedTensors()
    body = client.ask(large_request())
    ticket = MemoryBody(body.content_type, body.read_all(1 << 20))
    happens()
    client.receive(ticket, received)
    return received


def test_a_killed_server_leaves_what_it_sent() -> None:
    expected, files = expected_answer(), abandoned_memory()
    with faulty_server(LARGE, transports=("shm",)) as server:
        for number in range(STARTS):
            if number:
                server.start()
            with connect(server.url) as idle, connect(server.url) as reader, connect(server.url) as holder:
                held = fetch(holder)
                assert_same_bits(fetch_while(reader, server.kill), expected)
                assert_same_bits(held, expected)
                for client in (idle, reader, holder):
                    assert client.channel.broken
                with pytest.raises(ConnectError):
                    fetch(idle)
    wait_until(lambda: abandoned_memory() <= files, "the end of the killed servers' files")


def test_a_stopped_server_does_not_matter_once_it_has_sent() -> None:
    with faulty_server(LARGE, transports=("shm",)) as server, connect(server.url) as client:
        expected = expected_answer()
        for _ in range(ROUNDS):
            try:
                received = fetch_while(client, server.freeze)
            finally:
                server.thaw()
            assert_same_bits(received, expected)


def test_a_server_restarted_under_a_running_prefetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 0.02)
    items = [rows_of(seed) for seed in range(4 * STARTS)]
    with (
        faulty_server({"delay": 0.01}, transports=("shm",), max_batch_tokens=1) as victim,
        RemoteEagle3TargetModel.from_urls(
            [victim.url], transport="shm", encoding="probs", timeout=30.0, max_retries=5
        ) as target,
    ):
        target.set_vocab_mapping(mapping_of())
        for number, batch in enumerate(target.prefetch(items, depth=4)):
            assert_same_batch(batch, expected_batch(items[number]))
            if number % 4 == 1:
                victim.kill()
                victim.start()
        assert number == len(items) - 1
        assert target.model_info()["servers"][0]["transport"] == "shm"
        assert target.model_info()["servers"][0]["fallbacks"] == 0
