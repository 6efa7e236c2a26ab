"""Forwards that do not return: noticed, told, and nobody waits for them."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from eagle_target.errors import EngineStuck, Unavailable
from eagle_target.protocol import messages
from eagle_target.testing.server import loopback_server
from tests.server.cases import HeadRunner, TestRunner, engine, mapping_of, request_of, wait_until
from tests.server.http import ask, assert_problem, body_of, put_mapping

STUCK = r"the server is stuck: a forward did not return within 0\.2 s \(forward_timeout\)"


def test_a_forward_that_does_not_return_is_told_to_everybody(caplog: pytest.LogCaptureFixture) -> None:
    runner = TestRunner()
    with (
        caplog.at_level(logging.CRITICAL),
        loopback_server(lambda: runner, forward_timeout=0.2, max_batch_tokens=4) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        put_mapping(server.url, mapping_of())
        runner.gate.clear()
        body = body_of(request_of([4]))
        waiting = [pool.submit(ask, server.url, "POST", messages.SUPERVISION, body) for _ in range(2)]
        try:
            for answer in waiting:
                assert_problem(answer.result(30), 503, "stuck", STUCK, retry_after="1")
            for method, path in (("GET", messages.READY), ("POST", messages.SUPERVISION)):
                content = body if method == "POST" else None
                assert_problem(ask(server.url, method, path, content), 503, "stuck", STUCK, retry_after="1")
            metrics = ask(server.url, "GET", messages.METRICS).body.decode()
            assert "eagle_target_stuck_forwards_total 1.0" in metrics
            assert 'eagle_target_state{state="stuck"} 1.0' in metrics
            assert ask(server.url, "GET", messages.HEALTH).status == 200
            assert server.engine.ended_by is EngineStuck
        finally:
            runner.gate.set()
        # It came back after all, but what it gave was given up.
        assert server.engine.state == "stuck"
    assert "a forward did not return within 0.2 s (forward_timeout); every thread's stack:" in caplog.text
    first = caplog.text.partition("every thread's stack:\n")[2]
    assert first.startswith("thread eagle-target-engine:")
    assert 'assert self.gate.wait(PATIENCE_SECONDS), "the test never opened the gate"' in first


def test_a_projection_that_does_not_return_leaves_nobody_waiting() -> None:
    runner = HeadRunner()
    with engine(lambda: runner, forward_timeout=0.2, max_batch_tokens=4) as server:
        runner.head_gate.clear()
        futures = [server.submit(request_of([4], seed=seed)) for seed in range(6)]
        try:
            for future in futures:
                with pytest.raises(Unavailable, match="stuck: a projection did not return"):
                    future.result(30)
        finally:
            runner.head_gate.set()
    assert runner.closed


def test_forwards_that_take_their_time_are_left_alone() -> None:
    with engine(lambda: TestRunner(delay=0.1), forward_timeout=10.0, max_batch_tokens=4) as server:
        for future in [server.submit(request_of([4])) for _ in range(3)]:
            future.result(30)
        assert (server.state, server.stuck_forwards) == ("ready", 0)


def test_without_a_timeout_nothing_is_watched() -> None:
    runner = TestRunner()
    with engine(lambda: runner, forward_timeout=0) as server:
        runner.gate.clear()
        future = server.submit(request_of([4]))
        wait_until(lambda: runner.entered)
        assert server.state == "ready"
        runner.gate.set()
        future.result(30)
