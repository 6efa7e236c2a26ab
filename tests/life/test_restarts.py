"""When an engine is loaded again, when it is not, and what those who wait are told."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest

from eagle_target.errors import AdapterError, EngineDead, Unavailable
from eagle_target.server.engine import lifecycle, scheduler
from eagle_target.server.engine.server import TargetModelServer
from tests.server.cases import (
    HeadRunner,
    TestRunner,
    assert_same_tensors,
    engine,
    expected_of,
    held,
    mapping_of,
    request_of,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from eagle_target.contract.runner import TargetForward, TargetRunner

NEVER_SECONDS = 3600.0


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "FIRST_PAUSE_SECONDS", 0.01)


class Loads:
    """Gives one runner after the other, and raises those that are errors."""

    def __init__(self, *outcomes: TestRunner | Exception) -> None:
        self._outcomes = iter(outcomes)
        self.count = 0

    def __call__(self) -> TargetRunner:
        self.count += 1
        outcome = next(self._outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class Dying(TestRunner):
    """Dies of token POISON, for good."""

    def __init__(self) -> None:
        super().__init__(poison=EngineDead)
        self._death: EngineDead | None = None

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        try:
            forward = super().forward_eagle3(input_ids, seq_lens)
        except EngineDead as error:
            self._death = EngineDead(str(error))
        if self._death is not None:
            raise self._death
        return forward


def assert_serves(server: TargetModelServer) -> None:
    assert_same_tensors(server.submit(request_of([4])).result(30).tensors, expected_of(request_of([4])))


def test_an_engine_that_is_dead_is_loaded_again_and_everything_else_is_kept() -> None:
    first, second = Dying(), TestRunner()
    load = Loads(first, second)
    with engine(load, max_restarts=1, max_batch_tokens=4) as server:
        server.add_mapping(mapping_of(5))
        assert_serves(server)
        served = server.served
        with held(server, first):
            waiting = [server.submit(request_of([4], poisonous=True)), server.submit(request_of([3], seed=2))]
        for future in waiting:
            with pytest.raises(
                Unavailable, match=r"the server is loading: a poisonous token \(restart 1 of 1"
            ) as caught:
                future.result(30)
            assert (caught.value.problem, caught.value.retry_after) == ("loading", 1.0)
        wait_until(lambda: server.state == "ready")
        assert_serves(server)
        assert server.find_mapping(mapping_of(5).sha256) == mapping_of(5)
        assert server.served == served
        assert (server.failure, server.ended_by, server.restarts, load.count) == (None, None, 1, 2)
        assert first.closed
        assert not second.closed


def test_an_engine_that_dies_while_nobody_asks_is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "IDLE_SECONDS", 0.05)

    class Watched(TestRunner):
        death: EngineDead | None = None

        def check_alive(self) -> None:
            if self.death is not None:
                raise self.death

    first, second = Watched(), Watched()
    with engine(Loads(first, second), max_restarts=1) as server:
        assert_serves(server)
        first.death = EngineDead("its process is gone")
        wait_until(lambda: server.restarts == 1 and server.state == "ready")
        assert_serves(server)
        assert (first.closed, second.closed) == (True, False)


def test_a_joined_forward_that_kills_the_engine_is_not_tried_request_by_request() -> None:
    runner = Dying()
    with engine(Loads(runner, TestRunner()), max_restarts=1) as server:
        with held(server, runner):
            futures = [server.submit(request_of([4], seed=seed, poisonous=seed == 1)) for seed in range(3)]
        for future in futures:
            with pytest.raises(Unavailable, match="loading"):
                future.result(30)
        assert runner.entered == 2
        wait_until(lambda: server.state == "ready")


def test_a_head_that_is_dead_counts_as_well() -> None:
    runner = HeadRunner()
    with engine(Loads(runner, TestRunner()), max_restarts=1) as server:
        runner.head_errors = {1: EngineDead("the head's process is gone")}
        with pytest.raises(Unavailable, match="loading: the head's process is gone"):
            server.submit(request_of([4])).result(30)
        wait_until(lambda: server.state == "ready")
        assert_serves(server)


def test_a_call_that_finds_the_engine_dead_counts_as_well() -> None:
    class Deaf(TestRunner):
        def input_embedding_weight(self) -> torch.Tensor:
            raise EngineDead("nobody is there")

    with engine(Loads(Deaf(), TestRunner()), max_restarts=1) as server:
        with pytest.raises(Unavailable, match="loading: nobody is there"):
            server.input_embedding_weight().result(30)
        wait_until(lambda: server.state == "ready")
        assert_serves(server)


def test_a_process_that_an_engine_wants_to_end_goes_on_with_another_engine() -> None:
    with engine(Loads(TestRunner(poison=SystemExit), TestRunner()), max_restarts=1) as server:
        with pytest.raises(Unavailable):
            server.submit(request_of([4], poisonous=True)).result(30)
        wait_until(lambda: server.state == "ready" and server.restarts == 1)
        assert_serves(server)


def test_an_engine_that_cannot_be_closed_is_replaced_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(TestRunner):
        def close(self) -> None:
            raise OSError("no such process")

    with engine(Loads(Stubborn(poison=EngineDead), TestRunner()), max_restarts=1) as server:
        with pytest.raises(Unavailable):
            server.submit(request_of([4], poisonous=True)).result(30)
        wait_until(lambda: server.state == "ready" and server.restarts == 1)
        assert_serves(server)
    assert "the engine could not be closed" in caplog.text


def test_loading_is_tried_again_until_there_are_no_more_restarts() -> None:
    load = Loads(Dying(), AdapterError("no memory yet"), AdapterError("still none"), AdapterError("none at all"))
    with engine(load, max_restarts=3) as server:
        with pytest.raises(Unavailable):
            server.submit(request_of([4], poisonous=True)).result(30)
        wait_until(lambda: server.state == "failed")
        assert (server.failure, server.ended_by, server.restarts, load.count) == ("none at all", EngineDead, 3, 4)
        with pytest.raises(Unavailable, match="the server is failed: none at all"):
            server.submit(request_of([4]))


def test_without_restarts_a_dead_engine_ends_the_server() -> None:
    load = Loads(Dying())
    with engine(load) as server:
        with pytest.raises(Unavailable, match="the server is failed: a poisonous token") as caught:
            server.submit(request_of([4], poisonous=True)).result(30)
        assert caught.value.problem == "failed"
        wait_until(lambda: server.state == "failed")
        assert (server.ended_by, load.count) == (EngineDead, 1)


def test_a_first_load_that_fails_is_not_tried_again() -> None:
    load = Loads(AdapterError("no such checkpoint"), TestRunner())
    with engine(load, state="failed", max_restarts=5) as server:
        assert (server.failure, server.ended_by, load.count) == ("no such checkpoint", AdapterError, 1)


def test_another_target_is_not_served() -> None:
    load = Loads(Dying(), TestRunner(seed=1), TestRunner())
    with engine(load, max_restarts=5) as server:
        fingerprint = server.served.fingerprint
        with pytest.raises(Unavailable):
            server.submit(request_of([4], poisonous=True)).result(30)
        wait_until(lambda: server.state == "failed")
        message = (
            f"loaded again is another: fingerprint .* instead of {fingerprint} .model: embedding-211x16x8-seed0 !="
        )
        with pytest.raises(Unavailable, match=message):
            server.submit(request_of([4]))
        assert (server.ended_by, load.count) == (EngineDead, 2)


class Broken(TestRunner):
    """Fails every forward once it is told to, without saying that it is dead."""

    is_broken = False

    def forward_eagle3(self, *arguments: Any) -> Any:
        if self.is_broken:
            raise AdapterError("CUDA error: an illegal memory access was encountered")
        return super().forward_eagle3(*arguments)


def test_an_engine_that_fails_at_everything_is_dead() -> None:
    runner = Broken()
    with engine(Loads(runner, TestRunner()), max_restarts=1) as server:
        assert_serves(server)
        runner.is_broken = True
        for _ in range(3):
            with pytest.raises(AdapterError, match="illegal memory access"):
                server.submit(request_of([4])).result(30)
        wait_until(lambda: server.restarts == 1)
        wait_until(lambda: server.state == "ready")
        assert_serves(server)


def test_bad_requests_do_not_make_an_engine_dead() -> None:
    runner = TestRunner()
    with engine(Loads(runner), max_restarts=1) as server:
        for _ in range(7):
            with pytest.raises(AdapterError, match="a poisonous token"):
                server.submit(request_of([4], poisonous=True)).result(30)
        wait_until(lambda: runner.forwards.count((2,)) == 2, "both trials")
        assert (server.state, server.restarts) == ("degraded", 0)
        assert_serves(server)


def test_a_server_that_drains_does_not_load_again() -> None:
    runner = Dying()
    load = Loads(runner, TestRunner())
    with engine(load, max_restarts=5) as server:
        with held(server, runner):
            queued = server.submit(request_of([4], poisonous=True))
            server.drain()
        with pytest.raises(Unavailable):
            queued.result(30)
        wait_until(lambda: server.state == "failed")
        assert (server.ended_by, load.count) == (EngineDead, 1)


def end_by_draining(server: TargetModelServer) -> None:
    server.drain()
    assert server.state == "draining"
    server.close()


@pytest.mark.parametrize("end", [TargetModelServer.close, end_by_draining])
def test_a_pause_before_a_restart_is_cut_short(
    end: Callable[[TargetModelServer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "FIRST_PAUSE_SECONDS", NEVER_SECONDS)
    monkeypatch.setattr(lifecycle, "LONGEST_PAUSE_SECONDS", NEVER_SECONDS)
    load = Loads(Dying(), TestRunner())
    with engine(load, max_restarts=1) as server:
        with pytest.raises(Unavailable):
            server.submit(request_of([4], poisonous=True)).result(30)
        wait_until(lambda: server.state == "loading")
        end(server)
        assert (server.state, server.ended_by, load.count) == ("closed", None, 1)


def test_closing_while_an_engine_is_loaded_again_releases_it() -> None:
    is_loading, go, late = threading.Event(), threading.Event(), TestRunner()
    runners = iter((Dying(), late))

    def load() -> TargetRunner:
        runner = next(runners)
        if runner is late:
            is_loading.set()
            assert go.wait(30)
        return runner

    with engine(load, max_restarts=1) as server:
        with pytest.raises(Unavailable):
            server.submit(request_of([4], poisonous=True)).result(30)
        assert is_loading.wait(30)
        server.close(timeout=0.01)
        go.set()
        server.close()
        assert (server.state, late.closed) == ("closed", True)


def test_the_log_says_what_follows(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), engine(Loads(Dying(), TestRunner()), max_restarts=2) as server:
        with pytest.raises(Unavailable):
            server.submit(request_of([4], poisonous=True)).result(30)
        wait_until(lambda: server.state == "ready" and server.restarts == 1)
    assert "the engine stopped: EngineDead: a poisonous token" in caplog.text
    assert "the engine is loaded again in 0.01 s, restart 1 of 2 within an hour" in caplog.text
