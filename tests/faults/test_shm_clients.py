"""Clients of transport `shm` that are killed, or hold what they have; seen from the server and from other clients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from eagle_target.client import balancer
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.errors import TransportError
from eagle_target.testing.comparison import assert_same_batch, assert_same_bits
from tests.client.batches import expected_batch, rows_of
from tests.faults.processes import LARGE, ServerUnderFault, abandoned_memory, faulty_server
from tests.faults.proxy import proxied
from tests.faults.shm_clients import connect, doomed_clients, expected_answer, fetch
from tests.server.cases import mapping_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 20
# Three answers of about 20 MB.
MAX_BYTES = 64 << 20
# An answer on its way, and what the allocator keeps.
SLACK_BYTES = 64 << 20


@pytest.fixture(scope="module")
def large_server() -> Iterator[ServerUnderFault]:
    options = {"max_bytes": MAX_BYTES, "send_timeout": 2.0, "take_timeout": 0.5}
    with faulty_server(
        LARGE, transports=("shm", "wire"), transport_options={"shm": options}, channel_lease=20.0
    ) as running:
        # What the first requests open for good.
        with connect(running.url) as client:
            fetch(client)
        yield running


def _mappings(server: ServerUnderFault) -> int:
    """Segments that the server has mapped."""
    return Path(f"/proc/{server.process.pid}/maps").read_text(encoding="ascii").count("eagle-target-shm")


def test_killed_clients_leave_nothing_behind(large_server: ServerUnderFault) -> None:
    expected, files = expected_answer(), abandoned_memory()
    server = psutil.Process(large_server.process.pid)
    with connect(large_server.url) as other:
        # What threads keep for good is taken in the first rounds.
        for _ in range(3):
            with doomed_clients(large_server.url):
                assert_same_bits(fetch(other), expected)
        wait_until(lambda: _mappings(large_server) == 1)
        rss, fds, threads = large_server.rss(), large_server.fds(), server.num_threads()
        for _ in range(ROUNDS):
            with doomed_clients(large_server.url):
                assert large_server.fds() > fds
            assert_same_bits(fetch(other), expected)
        wait_until(lambda: large_server.fds() <= fds, f"no more than {fds} open files of the server")
        wait_until(lambda: server.num_threads() <= threads, "the end of threads")
        wait_until(lambda: _mappings(large_server) == 1, "the end of the killed clients' shared memory")
        wait_until(lambda: large_server.rss() < rss + SLACK_BYTES, "the memory of the killed clients")
        wait_until(lambda: abandoned_memory() <= files, "the end of the killed clients' files")


def test_a_client_that_holds_its_batches_hurts_itself_alone(large_server: ServerUnderFault) -> None:
    expected = [expected_answer(seed) for seed in range(2)]
    with connect(large_server.url) as greedy, connect(large_server.url) as other:
        # About 20 MB each: the third fits if nothing lies between.
        held = [fetch(greedy) for _ in range(2)]
        with pytest.raises(TransportError, match=r"within 2 s.* option max_bytes"):
            held += [fetch(greedy) for _ in range(2)]
        for number in range(ROUNDS):
            assert_same_bits(fetch(other, number % 2), expected[number % 2])
        for answer in held:
            assert_same_bits(answer, expected[0])
        held.clear()
        del answer
        assert_same_bits(fetch(greedy, 1), expected[1])


def test_answers_whose_connection_is_cut_are_asked_for_again(
    large_server: ServerUnderFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their memory is taken back: twenty of them are more than a channel has."""
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 0.02)
    rows = {name: torch.ones(1, 256, dtype=torch.int64) for name in ("input_ids", "attention_mask", "loss_mask")}
    with (
        proxied(large_server.url) as proxy,
        RemoteEagle3TargetModel.from_urls(
            [proxy.url], transport="shm", encoding="logits", max_retries=9, timeout=30.0
        ) as target,
    ):
        expected = target.generate_batch(**rows)
        for _ in range(ROUNDS):
            proxy.fail_next("reset", after=0, times=1)
            assert_same_batch(target.generate_batch(**rows), expected)
        assert target.model_info()["servers"][0]["transport"] == "shm"
        # A cut may meet the renewal of a lease instead.
        assert target.model_info()["traffic"]["retries"] >= ROUNDS // 2


def test_a_client_that_was_silent_too_long_opens_another_channel() -> None:
    with (
        faulty_server(transports=("shm",), channel_lease=0.3) as server,
        RemoteEagle3TargetModel.from_urls([server.url], transport="shm", encoding="probs", timeout=30.0) as target,
        proxied(server.url) as proxy,
        RemoteEagle3TargetModel.from_urls([proxy.url], transport="shm", encoding="probs", timeout=30.0) as silent,
    ):
        for each in (target, silent):
            each.set_vocab_mapping(mapping_of())
            assert_same_batch(each.generate_batch(**rows_of()), expected_batch(rows_of()))
        fds = server.fds()
        proxy.fail_next("reset", after=0, times=1000, direction="request")
        wait_until(lambda: server.fds() < fds, "the end of the silent client's channel")
        proxy.fail_next("reset", after=0, times=0)
        for seed in range(3):
            for each in (target, silent):
                assert_same_batch(each.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))
        assert silent.model_info()["servers"][0]["transport"] == "shm"
