"""Several servers, some of them bad: the run goes on, batch by batch, as long as one good server is left."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from eagle_target.client import balancer
from eagle_target.errors import ConfigError, ConnectError, ContractError, ProtocolError, ServerError
from eagle_target.protocol import messages
from tests.client.batches import assert_same_batch, expected_batch, rows_of
from tests.client.stub import Received, forwarding, reply, replying
from tests.failover.runs import SOON_SECONDS, client, is_used, run, server_of
from tests.faults.processes import ServerUnderFault, faulty_server, free_port
from tests.server.cases import mapping_of, wait_until
from tests.server.http import Answer, ask

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCHES = 24


@pytest.fixture(scope="module")
def good() -> Iterator[ServerUnderFault]:
    with faulty_server({"delay": 0.005}) as server:
        yield server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 0.05)


def broken(request: Received, answer: Answer) -> Answer:
    """A server that shakes hands, and fails on every batch."""
    return Answer(500, {"Content-Length": "4"}, b"boom") if request.path == messages.SUPERVISION else answer


def dead_url() -> str:
    return f"http://127.0.0.1:{free_port()}"


@pytest.mark.parametrize("transport", ["wire", "shm", "nccl", "auto"])
def test_servers_killed_one_after_the_other(good: ServerUnderFault, transport: str) -> None:
    with (
        faulty_server({"delay": 0.005}) as second,
        faulty_server({"delay": 0.005}) as third,
        client(second.url, good.url, third.url, transport=transport) as target,
    ):
        run(target, BATCHES, {4: second.kill, 10: third.kill, 16: second.start})
        assert server_of(target, good.url)["healthy"]
        assert not server_of(target, third.url)["healthy"]
        wait_until(lambda: is_used(target, second.url), "the server that came back")


def test_a_slow_server_and_one_that_is_frozen_for_a_while(good: ServerUnderFault) -> None:
    with (
        faulty_server({"delay": 0.15}) as slow,
        faulty_server() as frozen,
        client(slow.url, frozen.url, good.url, timeout=1.0) as target,
    ):
        pid = int(frozen.process.pid or 0)
        try:
            run(target, BATCHES, {4: lambda: os.kill(pid, signal.SIGSTOP)})
        finally:
            os.kill(pid, signal.SIGCONT)
        assert server_of(target, slow.url)["healthy"]
        wait_until(lambda: is_used(target, frozen.url), "the server that goes on")


def test_a_server_that_answers_500_for_ever(good: ServerUnderFault) -> None:
    with (
        forwarding(good.url, broken) as bad,
        replying(reply(b"", 500)) as worse,
        client(bad.url, worse.url, good.url, min_servers=2) as target,
    ):
        run(target, BATCHES)
        for url in (bad.url, worse.url):
            assert server_of(target, url)["failures"] > 0
            assert "status 500" in server_of(target, url)["last_error"]
        assert server_of(target, good.url)["healthy"]
    # It answers: that is no outage, and is not waited out.
    refused = pytest.raises(ServerError, match=r"boom \(gave up after 4 attempts")
    with forwarding(good.url, broken) as bad, client(bad.url) as target, refused:
        target.generate_batch(**rows_of())


def test_a_server_with_another_model_is_refused_and_the_others_go_on(good: ServerUnderFault) -> None:
    with faulty_server({"seed": 1}) as other, faulty_server() as third:
        with pytest.raises(ContractError, match="serve different targets: model"), client(good.url, other.url):
            pass
        with client(good.url, other.url, third.url, min_servers=2) as target:
            assert not server_of(target, other.url)["healthy"]
            assert "different targets: model" in server_of(target, other.url)["last_error"]
            # Soon it is the third server that has come back with another model, and then it is right again.
            run(target, BATCHES, {4: third.kill, 5: lambda: restart_as(third, 2)})
            wait_until(lambda: not is_used(target, third.url), "its refusal")
            third.kill()
            restart_as(third, 0)
            wait_until(lambda: is_used(target, third.url), "its return")
        with pytest.raises(ContractError, match="different targets"), client(good.url, other.url, min_servers=2):
            pass


def restart_as(server: ServerUnderFault, seed: int) -> None:
    server.runner["seed"] = seed
    server.start()


def test_a_head_and_an_embedding_of_another_model_are_refused() -> None:
    with faulty_server() as server, client(server.url, encoding="hidden", max_retries=0, retry_timeout=0.0) as target:
        server.kill()
        restart_as(server, 1)
        with pytest.raises(ProtocolError, match=messages.FINGERPRINT):
            target.set_vocab_mapping(mapping_of(1))
        with pytest.raises(ProtocolError, match=messages.FINGERPRINT):
            target.input_embedding_weight()
        server.kill()
        restart_as(server, 0)
        time.sleep(0.2)
        target.set_vocab_mapping(mapping_of(1))
        expected = expected_batch(rows_of(), mapping=mapping_of(1), encoding="hidden")
        assert_same_batch(target.generate_batch(**rows_of()), expected)


def test_servers_that_are_not_there_yet_are_used_when_they_are(good: ServerUnderFault) -> None:
    with faulty_server() as late:
        late.kill()
        with client(late.url, good.url, dead_url(), min_servers=1) as target:
            assert not server_of(target, late.url)["healthy"]
            run(target, 8)
            late.start()
            wait_until(lambda: is_used(target, late.url), "the late server")
            assert server_of(target, late.url)["transport"] == "wire"
    urls = (dead_url(), good.url, dead_url())
    with pytest.raises(ConnectError, match=r"not ready after 0.1 s"), client(*urls, min_servers=2, ready_timeout=0.1):
        pass
    for number, message in ((0, "'min_servers': .*greater than or equal to 1"), (4, "min_servers must be 1 to 3")):
        with pytest.raises(ConfigError, match=message), client(*urls, min_servers=number):
            pass


def test_however_many_servers_die_at_once_the_last_one_is_found(good: ServerUnderFault) -> None:
    with contextlib.ExitStack() as running:
        dying = [running.enter_context(faulty_server()) for _ in range(5)]
        urls = [*(server.url for server in dying), good.url]
        target = running.enter_context(client(*urls, max_retries=0, retry_timeout=0.0))
        for server in dying:
            server.kill()
        run(target, 8)
        assert [server_of(target, url)["healthy"] for url in urls] == [False] * 5 + [True]


def test_when_no_server_is_left_there_is_an_error_in_time_and_the_run_can_go_on_from_there() -> None:
    items = [rows_of(seed) for seed in range(8)]
    with (
        faulty_server() as first,
        faulty_server() as second,
        client(first.url, second.url, retry_timeout=1.5) as target,
    ):
        done = 0
        started = 0.0

        def train_until_the_servers_die() -> None:
            nonlocal done, started
            for batch in target.prefetch(items, depth=2):
                assert_same_batch(batch, expected_batch(items[done]))
                done += 1
                if done == 3:
                    started = time.monotonic()
                    first.kill()
                    second.kill()

        with pytest.raises(ConnectError, match=rf"gave up after \d+ attempts, on .*{first.port}"):
            train_until_the_servers_die()
        # Two batches may have been answered before.
        assert 3 <= done <= 5
        assert 1.5 <= time.monotonic() - started < SOON_SECONDS
        assert not any(server["healthy"] for server in target.model_info()["servers"])
        second.start()
        for number, batch in enumerate(target.prefetch(items[done:], depth=2), start=done):
            assert_same_batch(batch, expected_batch(items[number]))
        assert number == len(items) - 1


def test_an_outage_of_every_server_that_ends_in_time_is_only_a_wait() -> None:
    with faulty_server() as server, client(server.url, max_retries=0) as target:
        run(target, 2)
        server.kill()
        future = target.generate_batch_async(**rows_of(1))
        wait_until(lambda: server_of(target, server.url)["failures"] >= 2, "two failures")
        server.start()
        assert_same_batch(future.result(SOON_SECONDS), expected_batch(rows_of(1)))
        assert target.model_info()["traffic"]["retries"] >= 2


def test_failures_and_returns_are_logged(good: ServerUnderFault, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "eagle_target.client")
    with faulty_server() as victim, client(victim.url, max_retries=0) as target:
        victim.kill()
        future = target.generate_batch_async(**rows_of())
        wait_until(lambda: f"{victim.url} failed, the 2. time in a row: cannot connect" in caplog.text)
        victim.start()
        future.result(SOON_SECONDS)
    assert f"{victim.url} answers again, after " in caplog.text
    assert ask(good.url, "GET", messages.READY).status == 200


def test_more_mappings_in_use_than_a_server_keeps() -> None:
    """Each request finds its mapping driven out by the others', and gives it again until it holds."""
    with faulty_server({"delay": 0.002}, max_mappings=1) as server, contextlib.ExitStack() as clients:
        targets = [clients.enter_context(client(server.url, max_retries=0)) for _ in range(4)]
        mappings = [mapping_of(number) for number in range(len(targets))]
        for target, mapping in zip(targets, mappings, strict=True):
            target.set_vocab_mapping(mapping)
        asked = [
            (seed, mapping, target.generate_batch_async(**rows_of(seed)))
            for seed in range(6)
            for target, mapping in zip(targets, mappings, strict=True)
        ]
        for seed, mapping, future in asked:
            expected = expected_batch(rows_of(seed), mapping=mapping)
            assert_same_batch(future.result(2 * SOON_SECONDS), expected)
        assert all(target.model_info()["traffic"]["retries"] == 0 for target in targets)


def test_closing_does_not_wait_for_a_server_that_is_silent_while_a_channel_is_opened() -> None:
    with faulty_server() as server, client(server.url, transport="shm") as target:
        server.kill()
        server.start()
        pid = int(server.process.pid or 0)
        os.kill(pid, signal.SIGSTOP)
        try:
            waiting = target.generate_batch_async(**rows_of())
            wait_until(lambda: server_of(target, server.url)["outstanding"])
            started = time.monotonic()
            target.close()
            assert time.monotonic() - started < SOON_SECONDS / 2
            assert isinstance(waiting.exception(SOON_SECONDS), ConnectError)
        finally:
            os.kill(pid, signal.SIGCONT)
