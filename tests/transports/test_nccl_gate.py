"""The port at which clients of `nccl` come to a server: whom it takes, whom it sends away, and what is left of it."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from eagle_target_nccl import gate as gates
from eagle_target_nccl.gate import MAX_STRANGERS, NAME_BYTES, Gate, Visit

from eagle_target.errors import ConnectError, TransferTimeout
from tests.faults.processes import nothing_left_behind
from tests.server.cases import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def leak_check() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate(0)
    yield made
    made.close()


def come(visit: Visit, *words: bytes) -> socket.socket:
    connection = socket.create_connection((visit.host, visit.port), timeout=PATIENCE_SECONDS)
    for word in words:
        connection.sendall(word)
    return connection


def is_sent_away(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def taken(visit: Visit) -> socket.socket:
    return visit.wait(time.monotonic() + PATIENCE_SECONDS)


def is_there(connection: socket.socket, other: socket.socket) -> bool:
    """Whether two are the ends of one connection."""
    return bool(connection.getpeername() == other.getsockname())


def is_shut(visit: Visit) -> bool:
    """Nobody listens there any more."""
    try:
        come(visit).close()
    except ConnectionRefusedError:
        return True
    return False


def test_each_is_taken_to_who_expects_it(gate: Gate) -> None:
    visits = [gate.expect(HOST) for _ in range(4)]
    assert len({visit.port for visit in visits}) == 1
    for visit in reversed(visits):
        with come(visit, visit.name) as there, taken(visit) as here:
            assert is_there(there, here)
    with pytest.raises(ConnectionRefusedError):
        come(visits[0])


def test_a_name_may_come_in_parts_and_what_follows_it_is_left_to_be_read(gate: Gate) -> None:
    visit = gate.expect(HOST)
    with come(visit, visit.name[:3]) as there:
        # Another that comes meanwhile is looked at, too.
        with come(visit, bytes(NAME_BYTES)) as other:
            assert is_sent_away(other)
        there.sendall(visit.name[3:] + b"more")
        with taken(visit) as here:
            here.settimeout(PATIENCE_SECONDS)
            assert here.recv(100) == b"more"


def test_a_name_is_good_once(gate: Gate) -> None:
    visit, other = gate.expect(HOST), gate.expect(HOST)
    with come(visit, visit.name), taken(visit), come(visit, visit.name) as again:
        assert is_sent_away(again)
    gate.forget(other)


def test_who_says_nothing_is_sent_away_in_time(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "STRANGER_SECONDS", 0.2)
    visit = gate.expect(HOST)
    with come(visit) as silent, come(visit, visit.name[:-1]) as slow:
        assert is_sent_away(silent)
        assert is_sent_away(slow)
        with come(visit, visit.name), taken(visit):
            pass


def test_only_so_many_strangers_are_kept(gate: Gate) -> None:
    visit = gate.expect(HOST)
    with contextlib.ExitStack() as opened:
        strangers = [opened.enter_context(come(visit)) for _ in range(MAX_STRANGERS + 5)]
        for oldest in strangers[:5]:
            assert is_sent_away(oldest)
        assert select.select(strangers[5:], [], [], 0)[0] == [], "the others are not sent away"
        there = opened.enter_context(come(visit, visit.name))
        assert is_there(there, opened.enter_context(taken(visit)))
        for each in strangers[5:]:
            assert is_sent_away(each)


def test_a_client_that_does_not_come_is_waited_for_no_longer_than_agreed(gate: Gate) -> None:
    visit = gate.expect(HOST)
    with pytest.raises(TransferTimeout, match="no client came"):
        visit.wait(time.monotonic() + 0.05)
    gate.forget(visit)


@pytest.mark.parametrize("how", ["forget", "close"])
def test_who_waits_is_told_that_it_is_over(gate: Gate, how: str) -> None:
    visit = gate.expect(HOST)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(taken, visit)
        if how == "forget":
            gate.forget(visit)
        else:
            gate.close()
        with pytest.raises(ConnectError, match="closed before"):
            waiting.result(PATIENCE_SECONDS)


def test_one_that_came_too_late_is_sent_away(gate: Gate) -> None:
    visit = gate.expect(HOST)
    with come(visit, visit.name) as late:
        wait_until(lambda: is_shut(visit), "the end of listening when the last has come")
        gate.forget(visit)
        assert is_sent_away(late)


def test_a_closed_gate_expects_nobody(gate: Gate) -> None:
    gate.close()
    gate.close()
    with pytest.raises(ConnectError, match="closing"):
        gate.expect(HOST)


def test_it_may_be_used_from_many_threads(gate: Gate) -> None:
    def visit_once(number: int) -> bool:
        visit = gate.expect(f"127.0.0.{number % 3 + 1}")
        try:
            with come(visit, visit.name) as there, taken(visit) as here:
                return is_there(there, here)
        finally:
            gate.forget(visit)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(visit_once, range(200)))
