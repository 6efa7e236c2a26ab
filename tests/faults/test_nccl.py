"""Both ends of transport `nccl`, over TCP: killed, stopped and cut off, again and again."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING, Any, Literal

import pytest

from eagle_target.client import balancer
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.errors import ConnectError, TransferTimeout, TransportError
from eagle_target.testing.comparison import assert_same_batch
from eagle_target.testing.tiny import EmbeddingRunner
from tests.faults.nccl_ends import SOON_SECONDS, Footprint, Groups, client, proxied_groups, trainer_at
from tests.faults.processes import LARGE, ROWS, ServerUnderFault, faulty_server, total_of
from tests.server.cases import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.client.remote import RemoteEagle3TargetModel
    from eagle_target.contract.batch import Eagle3TargetBatch

# As many answers as a leak is seen by.
ROUNDS = 20
# Of what needs a server that starts again, and leaves nothing of it to look for.
STARTS = 4
DEADLINE_SECONDS = 1.0


def settings(**options: Any) -> dict[str, Any]:
    return {
        "transports": ("nccl",),
        "transport_options": {"nccl": {"transfer_timeout": DEADLINE_SECONDS, **options}},
        "channel_lease": 1.0,
    }


@pytest.fixture(scope="module")
def server() -> Iterator[ServerUnderFault]:
    with faulty_server(LARGE, **settings()) as running:
        yield running


@pytest.fixture(scope="module")
def expected() -> Eagle3TargetBatch:
    with RunnerEagle3TargetModel(EmbeddingRunner(**LARGE), encoding="logits") as target:
        return target.generate_batch(**ROWS)


@pytest.fixture
def groups(leak_check: None) -> Iterator[Groups]:
    with proxied_groups() as groups:
        yield groups


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 0.02)


def recovers(target: RemoteEagle3TargetModel, expected: Eagle3TargetBatch) -> bool:
    with contextlib.suppress(TransportError):
        assert_same_batch(target.generate_batch(**ROWS), expected)
        return True
    return False


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_clients_that_are_killed(server: ServerUnderFault, expected: Eagle3TargetBatch, moment: str) -> None:
    footprint = Footprint(server)
    with client(server.url) as bystander:
        for _ in range(ROUNDS):
            victim = trainer_at(moment, server.url)
            victim.signal(signal.SIGKILL)
            victim.end()
            assert_same_batch(bystander.generate_batch(**ROWS), expected)
        assert bystander.model_info()["traffic"]["retries"] == 0
    footprint.check()


def test_clients_that_stop_receiving_for_longer_than_the_deadline(
    server: ServerUnderFault, expected: Eagle3TargetBatch
) -> None:
    at_a_time = 10
    footprint = Footprint(server)
    with client(server.url) as bystander:
        for _ in range(ROUNDS // at_a_time):
            stopped = [trainer_at("during", server.url) for _ in range(at_a_time)]
            for each in stopped:
                each.signal(signal.SIGSTOP)
                each.go_on()
            late = time.monotonic() + 2 * DEADLINE_SECONDS
            while time.monotonic() < late:
                assert_same_batch(bystander.generate_batch(**ROWS), expected)
            for each in stopped:
                each.signal(signal.SIGCONT)
            for each in stopped:
                assert each.hear() == total_of(expected.logits)
                each.end()
        assert bystander.model_info()["traffic"]["retries"] == 0
    footprint.check()


def test_servers_that_are_killed_in_the_middle_of_a_transfer(
    server: ServerUnderFault, groups: Groups, expected: Eagle3TargetBatch
) -> None:
    patient = settings(transfer_timeout=SOON_SECONDS)
    with faulty_server(LARGE, **patient) as victim, client(victim.url, max_retries=0) as alone:
        for _ in range(STARTS):
            with groups.in_the_midst(victim.kill, then="reset"), pytest.raises(ConnectError):
                alone.generate_batch(**ROWS)
            victim.start()
            with client(victim.url, server.url) as both, groups.in_the_midst(victim.kill, then="reset"):
                for _ in range(2):
                    assert_same_batch(both.generate_batch(**ROWS), expected)
            victim.start()
            wait_until(lambda: recovers(alone, expected), "a batch of the restarted server")


def test_a_server_that_stops_in_the_middle_of_a_transfer_is_a_timeout(
    groups: Groups, expected: Eagle3TargetBatch
) -> None:
    with faulty_server(LARGE, **settings()) as frozen, client(frozen.url, max_retries=0, timeout=1.5) as target:
        for _ in range(3):
            with groups.in_the_midst(frozen.freeze, then="hold") as hold:
                # On a busy machine a batch may be late before its midst.
                while hold.left > 0:
                    with pytest.raises(TransportError) as late:
                        target.generate_batch(**ROWS)
            assert isinstance(late.value, TransferTimeout)
            frozen.thaw()
            wait_until(lambda: recovers(target, expected), "a batch of the server that goes on")
        groups.release()


def test_a_server_restarted_under_a_running_prefetch(expected: Eagle3TargetBatch) -> None:
    with faulty_server(LARGE, **settings()) as victim, client(victim.url, max_retries=8) as target:
        for number, batch in enumerate(target.prefetch([ROWS] * (3 * STARTS), depth=3)):
            assert_same_batch(batch, expected)
            if number % 3 == 1:
                victim.kill()
                victim.start()
        assert number == 3 * STARTS - 1


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_connection_that_is_cut_in_the_middle_of_a_transfer(
    server: ServerUnderFault, groups: Groups, expected: Eagle3TargetBatch, how: Literal["reset", "close"]
) -> None:
    footprint = Footprint(server)
    with client(server.url) as bystander, client(server.url) as target:
        for _ in range(ROUNDS):
            with groups.in_the_midst(then=how):
                assert_same_batch(target.generate_batch(**ROWS), expected)
            assert_same_batch(bystander.generate_batch(**ROWS), expected)
        for each in (target, bystander):
            assert each.model_info()["traffic"]["retries"] == 0
    footprint.check()
