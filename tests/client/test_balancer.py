"""Which server gets a request, and what happens when it does not go well."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from eagle_target.client import balancer
from eagle_target.client.balancer import Balancer, ServerHealth, is_busy, is_retryable
from eagle_target.errors import (
    AdapterError,
    ConfigError,
    ConnectError,
    ContractError,
    EagleTargetError,
    Overloaded,
    ProtocolError,
    RequestTooLarge,
    ServerError,
    TransferTimeout,
    Unavailable,
    VocabMappingError,
)
from tests.server.cases import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.client.session import ServerSession

PATIENCE_SECONDS = 20.0


def balancer_of(*urls: str, max_retries: int = 3, timeout: float = 10.0, retry_timeout: float = 0.0) -> Balancer:
    sessions = [
        cast("ServerSession", SimpleNamespace(url=url, transport="wire", refused={}, fallbacks=0)) for url in urls
    ]
    return Balancer(sessions, max_retries=max_retries, timeout=timeout, retry_timeout=retry_timeout)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(balancer, "BUSY_PAUSE_SECONDS", 0.01)


def failing(error: EagleTargetError, *urls: str) -> tuple[list[str], Callable[[ServerSession], str]]:
    """An operation that fails on these servers, and the list of those it ran on."""
    ran: list[str] = []

    def operation(session: ServerSession) -> str:
        ran.append(session.url)
        if session.url in urls:
            raise error
        return session.url

    return ran, operation


def test_the_server_with_the_least_outstanding_is_chosen() -> None:
    chooser = balancer_of("a", "b", "c")
    go = threading.Event()
    ran: list[str] = []

    def operation(session: ServerSession) -> str:
        ran.append(session.url)
        assert go.wait(PATIENCE_SECONDS)
        return session.url

    with ThreadPoolExecutor(7) as pool:
        futures = []
        for count in range(1, 8):
            futures.append(pool.submit(chooser.run, operation))
            wait_until(lambda count=count: len(ran) == count)  # type: ignore[misc]
        assert [server.outstanding for server in chooser.servers] == [3, 2, 2]
        go.set()
        assert sorted(future.result(PATIENCE_SECONDS) for future in futures) == [*"aaabbcc"]
    assert [server.outstanding for server in chooser.servers] == [0, 0, 0]


def test_a_request_that_failed_is_made_again_elsewhere() -> None:
    chooser = balancer_of("a", "b")
    ran, operation = failing(ConnectError("gone"), "a")
    assert chooser.run(operation) == "b"
    assert ran == ["a", "b"]
    assert chooser.retries == 1
    bad, good = chooser.servers
    assert (bad.failures, bad.last_error, bad.outstanding) == (1, "gone", 0)
    assert (good.failures, good.last_error, good.outstanding) == (0, None, 0)
    assert [chooser.run(operation) for _ in range(5)] == ["b"] * 5
    assert ran == ["a", *["b"] * 6]


@pytest.mark.usefixtures("short_pauses")
def test_a_server_that_failed_is_tried_again_after_a_pause() -> None:
    chooser = balancer_of("a")
    ran: list[str] = []

    def operation(session: ServerSession) -> str:
        ran.append(session.url)
        if len(ran) < 3:
            raise ConnectError("gone")
        return "well"

    assert chooser.run(operation) == "well"
    assert ran == ["a"] * 3
    assert (chooser.servers[0].failures, chooser.servers[0].last_error) == (0, None)


def test_pauses_grow_with_each_outage_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(balancer, "time", SimpleNamespace(monotonic=lambda: now))
    server = ServerHealth(cast("ServerSession", None))
    pauses = []
    for _ in range(7):
        server.fail(ConnectError("gone"))
        pauses.append(server.paused_until - now)
        server.fail(ConnectError("of the same outage"))
        assert server.paused_until - now == pauses[-1]
        now = server.paused_until
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert server.last_error == "of the same outage"
    server.succeed()
    server.fail(ConnectError("gone"))
    assert server.paused_until - now == 1.0


@pytest.mark.usefixtures("short_pauses")
def test_the_last_error_names_every_server_that_was_tried() -> None:
    chooser = balancer_of("a", "b", max_retries=2)
    ran, operation = failing(TransferTimeout("late"), "a", "b")
    with pytest.raises(TransferTimeout, match=r"^late \(gave up after 3 attempts, on a, b, [ab]\)$") as caught:
        chooser.run(operation)
    assert len(ran) == 3
    assert isinstance(caught.value.__cause__, TransferTimeout)


@pytest.mark.usefixtures("short_pauses")
def test_the_last_error_keeps_what_the_server_said() -> None:
    chooser = balancer_of("a", max_retries=0)
    error = Unavailable("bye", status=503, problem="draining", retry_after=3.0)
    with pytest.raises(Unavailable, match="gave up after 1 attempts, on a") as caught:
        chooser.run(failing(error, "a")[1])
    assert (caught.value.status, caught.value.problem, caught.value.retry_after) == (503, "draining", 3.0)


@pytest.mark.parametrize("problem", ["queue-full", "loading"])
@pytest.mark.usefixtures("short_pauses")
def test_waiting_for_a_busy_server_uses_up_no_retry(problem: str) -> None:
    chooser = balancer_of("a", max_retries=0)
    kind = Overloaded if problem == "queue-full" else Unavailable
    left = [kind("busy", status=503, problem=problem, retry_after=seconds) for seconds in (0.01, None, 0.01, 0.01)]

    def operation(_: ServerSession) -> str:
        if left:
            raise left.pop()
        return "well"

    assert chooser.run(operation) == "well"
    assert chooser.retries == 0
    assert chooser.servers[0].failures == 0


def test_another_server_is_asked_while_one_is_busy() -> None:
    chooser = balancer_of("a", "b", max_retries=0)
    ran, operation = failing(Overloaded("busy", status=503, problem="queue-full", retry_after=100.0), "a")
    assert [chooser.run(operation) for _ in range(4)] == ["b"] * 4
    assert ran == ["a", *"bbbb"]


@pytest.mark.usefixtures("short_pauses")
def test_a_server_that_stays_busy_is_an_error_in_the_end() -> None:
    chooser = balancer_of("a", max_retries=1, timeout=0.2)
    ran, operation = failing(Overloaded("busy", status=503, problem="queue-full"), "a")
    with pytest.raises(Overloaded, match=r"busy \(gave up after 2 attempts, on a, a\)"):
        chooser.run(operation)
    assert len(ran) > 3


RETRYABLE: list[tuple[EagleTargetError, bool, bool]] = [
    (ConnectError("x"), True, False),
    (TransferTimeout("x"), True, False),
    (ProtocolError("x"), True, False),
    (AdapterError("x"), True, False),
    (ServerError("x", status=500), True, False),
    (ServerError("x", status=408, problem="body-timeout"), True, False),
    (Unavailable("x", status=502, problem="http"), True, False),
    (Unavailable("x", status=503, problem="draining"), True, False),
    (Unavailable("x", status=503, problem="loading"), True, True),
    (Overloaded("x", status=503, problem="queue-full"), True, True),
    (RequestTooLarge("x", status=413), False, False),
    (ServerError("x", status=404, problem="not-found"), False, False),
    (ServerError("x", status=409, problem="unknown-channel"), False, False),
    (ServerError("x", status=409, problem="unknown-vocab-mapping"), True, True),
    (ContractError("x"), False, False),
    (VocabMappingError("x"), False, False),
    (ConfigError("x"), False, False),
]


@pytest.mark.parametrize(("error", "retryable", "busy"), RETRYABLE)
def test_what_is_tried_again(error: EagleTargetError, retryable: bool, busy: bool) -> None:
    assert (is_retryable(error), is_busy(error)) == (retryable, busy)
    if not retryable:
        chooser = balancer_of("a", "b")
        ran, operation = failing(error, "a", "b")
        with pytest.raises(type(error)) as caught:
            chooser.run(operation)
        assert caught.value is error
        assert ran == ["a"]
        assert chooser.servers[0].failures == 0


def test_an_error_that_is_not_ours_passes_and_counts_nothing_as_outstanding() -> None:
    chooser = balancer_of("a")

    def operation(_: ServerSession) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chooser.run(operation)
    assert (chooser.servers[0].outstanding, chooser.servers[0].failures) == (0, 0)


def test_stopping_wakes_whoever_waits_for_a_server() -> None:
    chooser = balancer_of("a")
    ran, operation = failing(Overloaded("busy", status=503, problem="queue-full", retry_after=1000.0), "a")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chooser.run, operation)
        wait_until(lambda: ran)
        started = time.monotonic()
        chooser.stop()
        error = waiting.exception(PATIENCE_SECONDS)
    assert isinstance(error, Overloaded)
    assert time.monotonic() - started < PATIENCE_SECONDS


@pytest.mark.usefixtures("short_pauses")
def test_servers_that_cannot_be_reached_are_asked_for_so_many_seconds() -> None:
    chooser = balancer_of("a", "b", max_retries=0, retry_timeout=0.3)
    ran, operation = failing(ConnectError("gone"), "a", "b")
    started = time.monotonic()
    with pytest.raises(ConnectError, match=r"gone \(gave up after \d+ attempts"):
        chooser.run(operation)
    assert 0.3 <= time.monotonic() - started < PATIENCE_SECONDS
    assert {*ran} == {"a", "b"}
    assert len(ran) > 4


def test_a_pause_does_not_outlast_the_time_for_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 1000.0)
    monkeypatch.setattr(balancer, "LONGEST_PAUSE_SECONDS", 1000.0)
    chooser = balancer_of("a", max_retries=0, retry_timeout=0.1)
    ran, operation = failing(TransferTimeout("late"), "a")
    with pytest.raises(TransferTimeout):
        chooser.run(operation)
    assert ran == ["a", "a"]


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("error", [ServerError("x", status=500), ProtocolError("x"), AdapterError("x")])
def test_what_a_server_answers_is_not_waited_out(error: EagleTargetError) -> None:
    chooser = balancer_of("a", max_retries=1, retry_timeout=PATIENCE_SECONDS)
    ran, operation = failing(error, "a")
    with pytest.raises(type(error)):
        chooser.run(operation)
    assert ran == ["a", "a"]


def test_however_many_servers_fail_the_one_that_does_not_is_found() -> None:
    chooser = balancer_of(*"abcdef", max_retries=0)
    ran, operation = failing(ServerError("x", status=500), *"abcde")
    assert chooser.run(operation) == "f"
    assert sorted(ran) == [*"abcdef"]


def test_health_is_told() -> None:
    chooser = balancer_of("a", "b")
    chooser.run(failing(ConnectError("gone"), "a")[1])
    bad, good = (server.describe() for server in chooser.servers)
    assert 0 < bad["paused_seconds"] <= 1
    where = {"transport": "wire", "transports_refused": {}, "fallbacks": 0}
    assert {**bad, "paused_seconds": 0} == {
        "url": "a",
        **where,
        "healthy": False,
        "failures": 1,
        "paused_seconds": 0,
        "outstanding": 0,
        "last_error": "gone",
    }
    assert {**good} == {
        "url": "b",
        **where,
        "healthy": True,
        "failures": 0,
        "paused_seconds": 0,
        "outstanding": 0,
        "last_error": None,
    }
