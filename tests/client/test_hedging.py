"""A batch that takes long is asked for on a second server: the first right answer is taken, the other is ended."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from eagle_target.client import balancer
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.config import ClientConfig
from eagle_target.errors import ConfigError, ContractError, ServerError
from eagle_target.protocol import messages
from eagle_target.targets import open_target
from eagle_target.testing.server import loopback_server
from tests.client.batches import assert_same_batch, expected_batch, rows_of
from tests.client.stub import encode, forwarding, stub
from tests.faults.processes import nothing_left_behind
from tests.server.cases import TestRunner, mapping_of, wait_until
from tests.server.http import Answer, ask

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from eagle_target.server.run import HttpServer
    from tests.client.stub import Received, Stub

SOON_SECONDS = 20.0
AFTER_SECONDS = 0.05
# Longer than any test.
NEVER_SECONDS = 600.0


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 0.02)


@pytest.fixture
def slow_runner() -> Iterator[TestRunner]:
    """A runner whose forwards wait until the test is over, or opens the gate."""
    runner = TestRunner()
    runner.gate.clear()
    yield runner
    runner.gate.set()


@pytest.fixture
def slow(slow_runner: TestRunner) -> Iterator[HttpServer]:
    with loopback_server(lambda: slow_runner) as server:
        yield server
        slow_runner.gate.set()


@pytest.fixture(scope="module")
def good() -> Iterator[HttpServer]:
    with loopback_server(TestRunner) as server:
        yield server


@contextlib.contextmanager
def hedging(*urls: str, **options: Any) -> Iterator[RemoteEagle3TargetModel]:
    """A client whose first request goes to the first server."""
    usual = {"transport": "wire", "encoding": "probs", "timeout": 30.0, "hedge_after": AFTER_SECONDS, "max_retries": 0}
    with RemoteEagle3TargetModel.from_urls(urls, **{"retry_timeout": 0.0, **usual, **options}) as target:
        if options.get("encoding") != "logits":
            target.set_vocab_mapping(mapping_of())
        yield target


def counted(target: RemoteEagle3TargetModel) -> tuple[int, int]:
    """Hedges made, and won."""
    traffic = target.model_info()["traffic"]
    return traffic["hedges"], traffic["hedges_won"]


def outstanding(target: RemoteEagle3TargetModel) -> list[int]:
    return [server["outstanding"] for server in target.model_info()["servers"]]


@contextlib.contextmanager
def answering(url: str, change: Callable[[Answer], Answer]) -> Iterator[Stub]:
    """A server whose answers of supervision are changed."""

    def of_supervision(request: Received, answer: Answer) -> Answer:
        return change(answer) if request.path == messages.SUPERVISION else answer

    with forwarding(url, of_supervision) as running:
        yield running


def failing(answer: Answer) -> Answer:
    return Answer(500, {"Content-Length": "0"}, b"")


def of_another_target(answer: Answer) -> Answer:
    return replace(answer, headers={**answer.headers, messages.FINGERPRINT.lower(): "0" * 64})


@pytest.mark.parametrize("transport", ["wire", "shm", "nccl", "inprocess"])
def test_a_slow_server_is_left_behind(slow: HttpServer, good: HttpServer, transport: str) -> None:
    with hedging(slow.url, good.url, transport=transport) as target:
        for seed in range(3):
            assert_same_batch(target.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))
        hedges, won = counted(target)
        assert hedges == won >= 1
        # Ended, though its forward is not.
        wait_until(lambda: outstanding(target) == [0, 0])
        assert target.model_info()["traffic"]["requests"] == 3
        assert target.model_info()["traffic"]["retries"] == 0
        assert all(server["healthy"] for server in target.model_info()["servers"])


def test_a_slow_server_is_left_behind_over_tls(slow_runner: TestRunner, tmp_path: Path) -> None:
    authority, own = trustme.CA(), tmp_path / "server.pem"
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(own))
    with (
        loopback_server(lambda: slow_runner, tls_cert=own, tls_key=own) as slow,
        loopback_server(TestRunner, tls_cert=own, tls_key=own) as good,
        hedging(slow.url, good.url, ca_file=tmp_path / "ca.pem") as target,
    ):
        for seed in range(3):
            assert_same_batch(target.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))
        assert counted(target)[1] >= 1
        wait_until(lambda: outstanding(target) == [0, 0])
        slow_runner.gate.set()


def test_a_slow_server_is_left_alone_for_a_while(slow: HttpServer, good: HttpServer) -> None:
    with hedging(slow.url, good.url, hedge_after=1.0) as target:
        for seed in range(4):
            target.generate_batch(**rows_of(seed))
        assert counted(target) == (1, 1)
        assert target.model_info()["servers"][0]["paused_seconds"] > 0


def test_what_nobody_waits_for_leaves_the_servers_queue(
    slow: HttpServer, slow_runner: TestRunner, good: HttpServer
) -> None:
    with hedging(slow.url, good.url) as target, ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(target.generate_batch, **rows_of(seed)) for seed in range(6)]:
            future.result(SOON_SECONDS)
        wait_until(lambda: outstanding(target) == [0, 0])
        slow_runner.gate.set()
        wait_until(lambda: "queue_requests 0.0" in ask(slow.url, "GET", messages.METRICS).body.decode())
        assert slow_runner.entered == 1


def test_batches_come_in_order_and_no_request_is_hedged_twice(slow: HttpServer, good: HttpServer) -> None:
    items = [rows_of(seed) for seed in range(12)]
    with hedging(slow.url, good.url) as target:
        for rows, batch in zip(items, target.prefetch(items, depth=4), strict=True):
            assert_same_batch(batch, expected_batch(rows))
        hedges, won = counted(target)
        assert 1 <= won <= hedges <= len(items)
        assert target.model_info()["traffic"]["requests"] == len(items)


def test_an_answer_in_time_needs_no_hedge(good: HttpServer) -> None:
    with loopback_server(TestRunner) as other, hedging(good.url, other.url, hedge_after=NEVER_SECONDS) as target:
        for seed in range(4):
            assert_same_batch(target.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))
        assert counted(target) == (0, 0)


def test_without_the_option_there_are_none(good: HttpServer) -> None:
    with hedging(good.url, hedge_after=None) as target:
        target.generate_batch(**rows_of())
        assert counted(target) == (0, 0)


def test_the_only_server_is_waited_for(slow: HttpServer, slow_runner: TestRunner) -> None:
    with hedging(slow.url) as target, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(target.generate_batch, **rows_of())
        wait_until(lambda: slow_runner.entered)
        assert not waiting.done()
        slow_runner.gate.set()
        assert_same_batch(waiting.result(SOON_SECONDS), expected_batch(rows_of()))
        assert counted(target) == (0, 0)


def test_a_server_with_as_much_to_do_is_no_help_until_it_is_free(slow: HttpServer, slow_runner: TestRunner) -> None:
    busy_runner = TestRunner()
    busy_runner.gate.clear()
    with (
        loopback_server(lambda: busy_runner) as busy,
        hedging(slow.url, busy.url) as target,
        ThreadPoolExecutor(2) as pool,
    ):
        futures = [pool.submit(target.generate_batch, **rows_of(seed)) for seed in range(2)]
        wait_until(lambda: slow_runner.entered and busy_runner.entered)
        assert counted(target) == (0, 0)
        busy_runner.gate.set()
        for seed, future in enumerate(futures):
            assert_same_batch(future.result(SOON_SECONDS), expected_batch(rows_of(seed)))
        assert counted(target) == (1, 1)


@pytest.mark.parametrize("change", [failing, of_another_target])
def test_a_wrong_answer_of_the_second_server_is_not_taken(
    slow: HttpServer, slow_runner: TestRunner, good: HttpServer, change: Callable[[Answer], Answer]
) -> None:
    with (
        answering(good.url, change) as wrong,
        hedging(slow.url, wrong.url) as target,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(target.generate_batch, **rows_of())
        wait_until(lambda: counted(target) == (1, 0) and outstanding(target) == [1, 0])
        assert not target.model_info()["servers"][1]["healthy"]
        assert not waiting.done()
        slow_runner.gate.set()
        assert_same_batch(waiting.result(SOON_SECONDS), expected_batch(rows_of()))
        assert counted(target) == (1, 0)


def test_the_second_server_is_waited_for_when_the_first_fails(
    slow: HttpServer, slow_runner: TestRunner, good: HttpServer
) -> None:
    released = threading.Event()

    def held(answer: Answer) -> Answer:
        assert released.wait(SOON_SECONDS)
        return failing(answer)

    with answering(good.url, held) as wrong, hedging(wrong.url, slow.url) as target, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(target.generate_batch, **rows_of())
        wait_until(lambda: slow_runner.entered)
        released.set()
        # The first attempt goes on as without a hedge: on a server that is well.
        wait_until(lambda: outstanding(target) == [0, 2])
        assert not waiting.done()
        slow_runner.gate.set()
        assert_same_batch(waiting.result(SOON_SECONDS), expected_batch(rows_of()))
        assert target.model_info()["traffic"]["requests"] == 1
        assert target.model_info()["traffic"]["hedges"] == 1


def test_where_both_fail_the_first_error_is_told(good: HttpServer) -> None:
    hedged = threading.Event()

    def at_first(answer: Answer) -> Answer:
        assert hedged.wait(SOON_SECONDS)
        return failing(answer)

    def at_second(answer: Answer) -> Answer:
        hedged.set()
        return failing(answer)

    with (
        answering(good.url, at_first) as first,
        answering(good.url, at_second) as second,
        hedging(first.url, second.url) as target,
    ):
        with pytest.raises(ServerError, match=rf"gave up after \d attempts, on {first.url}"):
            target.generate_batch(**rows_of())
        assert counted(target) == (1, 0)


def test_an_error_that_any_server_would_give_ends_it(slow: HttpServer, good: HttpServer) -> None:
    problem = b'{"type": "urn:eagle-target:problem:contract", "detail": "wrong"}'

    def refusing(answer: Answer) -> Answer:
        return Answer(422, {"Content-Length": str(len(problem)), "Content-Type": "application/problem+json"}, problem)

    with answering(good.url, refusing) as other, hedging(slow.url, other.url) as target:
        with pytest.raises(ContractError, match="wrong"):
            target.generate_batch(**rows_of())
        wait_until(lambda: outstanding(target) == [0, 0])
        assert counted(target) == (1, 0)
        assert target.model_info()["servers"][0]["paused_seconds"] == 0


def test_bytes_of_both_answers_count(good: HttpServer) -> None:
    sent = threading.Event()
    over = threading.Event()
    halves: list[int] = []

    def half(request: Received, connection: socket.socket) -> bool:
        headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        answer = ask(good.url, request.method, request.path, request.body or None, headers)
        if request.path != messages.SUPERVISION:
            connection.sendall(encode(answer))
            return True
        halves.append(len(answer.body) // 2)
        connection.sendall(encode(answer)[: len(encode(answer)) - len(answer.body) + halves[0]])
        sent.set()
        over.wait(SOON_SECONDS)
        return False

    with hedging(good.url, hedge_after=None) as target:
        target.generate_batch(**rows_of())
        whole = target.model_info()["traffic"]["bytes_received"]

    def after_it(answer: Answer) -> Answer:
        assert sent.wait(SOON_SECONDS)
        return answer

    with (
        stub(half) as stuck,
        answering(good.url, after_it) as later,
        hedging(stuck.url, later.url) as target,
    ):
        assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
        assert counted(target) == (1, 1)
        wait_until(lambda: outstanding(target) == [0, 0])
        wait_until(lambda: target.model_info()["traffic"]["bytes_received"] > whole)
        assert target.model_info()["traffic"]["bytes_received"] == whole + halves[0]
        assert target.model_info()["traffic"]["tokens"] == int(rows_of()["attention_mask"].sum())
        over.set()


def test_closing_waits_for_no_server(slow: HttpServer, slow_runner: TestRunner, good: HttpServer) -> None:
    with nothing_left_behind():
        with hedging(slow.url, good.url) as target:
            target.generate_batch(**rows_of())
            alone = target.generate_batch_async(**rows_of(1))
            alone.result(SOON_SECONDS)
        slow_runner.gate.set()


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_a_time_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match="hedge_after must be"):
        RemoteEagle3TargetModel.from_urls(["http://127.0.0.1:1"], hedge_after=wrong)


def test_settings_name_it(slow: HttpServer, good: HttpServer, tmp_path: Path) -> None:
    mapping_of().save(tmp_path / "mapping.safetensors")
    config = ClientConfig(
        urls=(slow.url, good.url),
        hedge_after=AFTER_SECONDS,
        encoding="probs",
        transport="wire",
        vocab_mapping=tmp_path / "mapping.safetensors",
    )
    with open_target(config) as target:
        assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
        assert target.model_info()["traffic"]["hedges_won"] == 1
