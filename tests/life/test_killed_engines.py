"""Engines that are killed under a trainer that goes on."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.protocol import messages
from eagle_target.server.engine import lifecycle
from eagle_target.testing.server import loopback_server
from tests.client.batches import assert_same_batch, expected_batch, rows_of
from tests.life.engines import ChildRunner
from tests.server.cases import mapping_of, request_of, wait_until
from tests.server.http import ask, assert_problem, body_of, put_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.server.run import HttpServer

ROUNDS = 3
ITEMS_A_ROUND = 6


class Fleet:
    """Loads a `ChildRunner` each time; the latest is the one that serves."""

    def __init__(self, delay: float = 0.0) -> None:
        self._delay = delay
        self.loaded: list[ChildRunner] = []
        self.may_load = threading.Event()
        self.may_load.set()

    def load(self) -> ChildRunner:
        assert self.may_load.wait(30)
        self.loaded.append(ChildRunner(self._delay))
        return self.loaded[-1]


@contextlib.contextmanager
def served(fleet: Fleet, **settings: Any) -> Iterator[HttpServer]:
    try:
        with loopback_server(fleet.load, **settings) as server:
            yield server
    finally:
        assert not any(runner.process.is_alive() for runner in fleet.loaded)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(lifecycle, "RETRY_SECONDS", 0.1)


@pytest.mark.parametrize(("transport", "rounds"), [("wire", ROUNDS), ("shm", 2), ("inprocess", 2)])
def test_engines_killed_in_a_row_under_a_running_prefetch(transport: str, rounds: int) -> None:
    items = [rows_of(seed) for seed in range(ITEMS_A_ROUND * (rounds + 1))]
    fleet = Fleet(delay=0.005)
    with (
        served(fleet, max_batch_tokens=16, max_restarts=rounds) as server,
        RemoteEagle3TargetModel.from_urls(
            [server.url], transport=transport, encoding="probs", max_retries=0, retry_timeout=0.0
        ) as target,
    ):
        target.set_vocab_mapping(mapping_of())
        for number, batch in enumerate(target.prefetch(items, depth=4)):
            assert_same_batch(batch, expected_batch(items[number]))
            if number % ITEMS_A_ROUND == 3 and number // ITEMS_A_ROUND < rounds:
                fleet.loaded[-1].kill()
        assert number == len(items) - 1
        assert (server.engine.restarts, len(fleet.loaded)) == (rounds, rounds + 1)
        assert server.engine.state == "ready"
        assert server.engine.failure is None
        assert target.model_info()["traffic"]["requests"] == len(items)
        assert target.model_info()["servers"][0]["transport"] == transport
        metrics = ask(server.url, "GET", messages.METRICS).body.decode()
        assert f"eagle_target_engine_restarts_total {float(rounds)}" in metrics


def test_while_an_engine_is_loaded_again_requests_are_told_to_wait_and_why() -> None:
    fleet = Fleet()
    with served(fleet) as server, ThreadPoolExecutor(1) as pool:
        put_mapping(server.url, mapping_of())
        body = body_of(request_of([4]))
        assert ask(server.url, "POST", messages.SUPERVISION, body).status == 200
        fleet.may_load.clear()
        fleet.loaded[0].kill()
        reason = r"the server is loading: the engine's process ended with -9 \(restart 1 of 5 within an hour\)"
        for path, content in ((messages.SUPERVISION, body), (messages.SUPERVISION, body), (messages.READY, None)):
            answer = ask(server.url, "POST" if content else "GET", path, content)
            assert_problem(answer, 503, "loading", reason, retry_after="1")
        assert ask(server.url, "GET", messages.HEALTH).status == 200
        assert ask(server.url, "GET", messages.TARGET).status == 200
        with RemoteEagle3TargetModel.from_urls([server.url], encoding="probs") as target:
            waiting = pool.submit(_batch_of, target)
            wait_until(lambda: target.model_info()["servers"][0]["outstanding"])
            fleet.may_load.set()
            assert_same_batch(waiting.result(30), expected_batch(rows_of()))
        # The mapping was given once, to the engine before.
        assert ask(server.url, "POST", messages.SUPERVISION, body).status == 200
        assert len(fleet.loaded) == 2


def _batch_of(target: RemoteEagle3TargetModel) -> Any:
    target.set_vocab_mapping(mapping_of())
    return target.generate_batch(**rows_of())
