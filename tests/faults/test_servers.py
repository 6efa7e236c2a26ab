"""Servers that are killed, restarted, drained, frozen, or behind a bad network, seen from a trainer."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

from eagle_target.client import balancer
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.errors import ConnectError, TransferTimeout, TransportError
from eagle_target.protocol import messages
from eagle_target.testing.comparison import assert_same_batch
from eagle_target.testing.tiny import EmbeddingRunner
from tests.client.batches import expected_batch, rows_of
from tests.faults.processes import LARGE, ServerUnderFault, faulty_server
from tests.faults.proxy import Fault, proxied
from tests.server.cases import mapping_of, wait_until
from tests.server.http import ask

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from eagle_target.contract.batch import Eagle3TargetBatch

SOON_SECONDS = 30.0
ROUNDS = 5


@pytest.fixture(scope="module")
def server() -> Iterator[ServerUnderFault]:
    with faulty_server() as running:
        yield running


@pytest.fixture(scope="module")
def large_server() -> Iterator[ServerUnderFault]:
    with faulty_server(LARGE) as running:
        yield running


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 0.02)


@contextlib.contextmanager
def remote(*urls: str, **options: Any) -> Iterator[RemoteEagle3TargetModel]:
    usual: dict[str, Any] = {"transport": "wire", "encoding": "probs", "timeout": SOON_SECONDS, "retry_timeout": 0.0}
    options = {"ready_timeout": SOON_SECONDS, **usual, **options}
    with RemoteEagle3TargetModel.from_urls(urls, **options) as target:
        if options.get("encoding") != "logits":
            target.set_vocab_mapping(mapping_of())
        yield target


def assert_right(target: RemoteEagle3TargetModel, seed: int = 0) -> None:
    assert_same_batch(target.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))


def assert_recovered(alone: Future[Eagle3TargetBatch], both: RemoteEagle3TargetModel, dead: str) -> None:
    """A client of the killed server alone has its error; one of two servers knows which is dead."""
    with pytest.raises(ConnectError, match=rf"gave up after 2 attempts, on {dead}, {dead}"):
        alone.result(SOON_SECONDS)
    assert both.model_info()["traffic"]["retries"] == 1
    for described in both.model_info()["servers"]:
        assert described["healthy"] == (described["url"] != dead)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("moment", ["before", "during the forward"])
def test_a_killed_server(server: ServerUnderFault, moment: str) -> None:
    for _ in range(ROUNDS):
        with (
            faulty_server({"delay": 60.0 if moment == "during the forward" else 0.0}, max_batch_tokens=1) as victim,
            remote(victim.url, max_retries=1) as alone,
            remote(victim.url, server.url) as both,
            ThreadPoolExecutor(2) as pool,
        ):
            if moment == "before":
                victim.kill()
            futures = [pool.submit(target.generate_batch, **rows_of()) for target in (alone, both)]
            if moment == "during the forward":
                wait_until(lambda: "queue_requests 1.0" in ask(victim.url, "GET", messages.METRICS).body.decode())
                victim.kill()
            assert_same_batch(futures[1].result(SOON_SECONDS), expected_batch(rows_of()))
            assert_recovered(futures[0], both, victim.url)


@pytest.mark.usefixtures("short_pauses")
def test_a_server_killed_mid_response(large_server: ServerUnderFault) -> None:
    rows = {name: torch.ones(4, 128, dtype=torch.int64) for name in ("input_ids", "attention_mask", "loss_mask")}
    with RunnerEagle3TargetModel(EmbeddingRunner(**LARGE), encoding="logits") as target:
        expected = target.generate_batch(**rows)
    for _ in range(ROUNDS):
        with contextlib.ExitStack() as running:
            victim = running.enter_context(faulty_server(LARGE))
            proxy = running.enter_context(proxied(victim.url))
            alone = running.enter_context(remote(proxy.url, max_retries=1, encoding="logits"))
            both = running.enter_context(remote(proxy.url, large_server.url, encoding="logits"))
            pool = running.enter_context(ThreadPoolExecutor(2))
            proxy.fail_next("hold", after=100_000, times=2)
            futures = [pool.submit(target.generate_batch, **rows) for target in (alone, both)]
            wait_until(lambda proxy=proxy: proxy.failed == 2)  # type: ignore[misc]
            victim.kill()
            proxy.released.set()
            assert_same_batch(futures[1].result(SOON_SECONDS), expected)
            assert_recovered(futures[0], both, proxy.url)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_server_restarted_on_its_port_under_a_running_prefetch(how: str) -> None:
    items = [rows_of(seed) for seed in range(8 * (ROUNDS if how == "SIGKILL" else 2))]
    with faulty_server({"delay": 0.01}, max_batch_tokens=1) as victim, remote(victim.url) as target:
        for number, batch in enumerate(target.prefetch(items, depth=4)):
            assert_same_batch(batch, expected_batch(items[number]))
            if number % 8 == 3:
                if how == "SIGKILL":
                    victim.kill()
                else:
                    victim.terminate()
                    assert victim.join() == 0
                victim.start()
        assert number == len(items) - 1
        assert target.model_info()["traffic"]["requests"] == len(items)


def test_a_server_that_terminates_loses_nothing_of_active_clients(server: ServerUnderFault) -> None:
    items = [rows_of(seed) for seed in range(30)]
    for _ in range(3):
        with faulty_server({"delay": 0.01}) as victim, remote(victim.url, server.url, max_retries=1) as target:
            for number, batch in enumerate(target.prefetch(items, depth=8)):
                assert_same_batch(batch, expected_batch(items[number]))
                if number == 8:
                    victim.terminate()
            assert number == len(items) - 1
            assert victim.join() == 0


def test_a_frozen_server_is_left_alone_and_closing_does_not_wait_for_it(server: ServerUnderFault) -> None:
    with faulty_server() as frozen, remote(frozen.url, server.url, timeout=0.5) as both, remote(frozen.url) as alone:
        frozen.freeze()
        try:
            for seed in range(4):
                assert_right(both, seed)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(alone.generate_batch, **rows_of())
                wait_until(lambda: alone.model_info()["servers"][0]["outstanding"])
                alone.close()
                with pytest.raises(ConnectError, match="closed by this client"):
                    waiting.result(SOON_SECONDS)
        finally:
            frozen.thaw()


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("direction", ["answer", "request"])
@pytest.mark.parametrize("fault", ["reset", "close"])
def test_a_connection_cut_mid_transfer(server: ServerUnderFault, fault: Fault, direction: str) -> None:
    with proxied(server.url) as proxy, remote(proxy.url, max_retries=2) as target:
        for after in (0, 1, 60, 200, 600):
            proxy.fail_next(fault, after=after, times=2, direction=direction)
            failed = proxy.failed
            assert_right(target, after)
            assert proxy.failed == failed + 2
        assert target.model_info()["traffic"]["retries"] == 10
        proxy.fail_next(fault, after=400, times=100, direction=direction)
        # An answer that ends within its headers may look like one without what is cut off.
        with pytest.raises(TransportError, match=r"\(gave up after 3 attempts, on"):
            target.generate_batch(**rows_of())
        proxy.fail_next(fault, after=0, times=0)
        wait_until(lambda: _recovers(target))
    wait_until(lambda: server.connections() == 0)
    assert server.is_ready()


def _recovers(target: RemoteEagle3TargetModel) -> bool:
    with contextlib.suppress(TransportError):
        assert_right(target)
        return True
    return False


@pytest.mark.usefixtures("short_pauses")
def test_a_network_that_stops_passing_anything(server: ServerUnderFault) -> None:
    with proxied(server.url) as proxy, remote(proxy.url, timeout=0.3, max_retries=1) as target:
        proxy.fail_next("hold", after=400, times=2)
        with pytest.raises(TransferTimeout, match="gave up after 2 attempts"):
            target.generate_batch(**rows_of())
        proxy.released.set()
        assert_right(target)
    wait_until(lambda: server.connections() == 0)


def test_a_client_forgets_its_connections(server: ServerUnderFault) -> None:
    fds = server.fds()
    for _ in range(ROUNDS):
        with remote(server.url) as target:
            futures = [target.generate_batch_async(**rows_of(seed)) for seed in range(8)]
            if _ % 2:
                for future in futures:
                    future.result(SOON_SECONDS)
    wait_until(lambda: server.connections() == 0)
    wait_until(lambda: server.fds() <= fds)
