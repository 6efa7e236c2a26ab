"""Several servers, some of them bad, under a run that goes on."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.fault_sides.tally import Fault, Tally, client
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.protocol import messages
from eagle_target.server.engine import lifecycle
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import EmbeddingRunner
from tests.client.batches import rows_of
from tests.client.stub import Received, forwarding
from tests.failover.clocks import DAY, server_with_clock
from tests.faults.processes import ServerUnderFault, faulty_server
from tests.life.test_killed_engines import Fleet, served
from tests.server.cases import TestRunner, mapping_of, request_of
from tests.server.http import Answer, ask, body_of, put_mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from eagle_target.client.remote import RemoteEagle3TargetModel

BATCHES_A_ROUND = 4
OUTAGE_SECONDS = 0.5
STUCK_SECONDS = 0.3
# Until an engine is loaded again: 1 outside of here.
RESTART_SECONDS = 0.05
DELAY = {"delay": 0.002}
JUMPS = (DAY, -DAY, 3650 * DAY, 0.0)


def faults() -> Iterator[Fault]:
    """Each fault, over the wire unless it says otherwise."""
    yield Fault("one of three servers slow (0.1 s a forward)", "wire", _slow, "less throughput")
    yield Fault("one of two servers answers 500 for ever", "wire", _always_500, "retries, logged; `healthy: false`")
    yield Fault("one of three servers has another model", "wire", _other_model, "a warning; `healthy: false`")
    yield Fault("server comes back with another model", "wire", _comes_back_other, "a retry, logged; `healthy: false`")
    yield Fault("five of six servers killed at once", "wire", _five_of_six, "retries, logged")
    yield Fault(
        f"all servers killed, error after `retry_timeout` = {OUTAGE_SECONDS} s, one comes back",
        "wire",
        _all_gone,
        "`ConnectError`, then the batch",
        due="ConnectError",
    )
    for transport in ("wire", "shm", "nccl"):
        yield Fault("server's wall clock jumps by days", transport, _clock(transport), "nothing")
    yield Fault("engine's process killed under prefetch", "wire", _killed_engine, "a pause while it is loaded again")
    yield Fault(
        f"a forward never returns, `forward_timeout` = {STUCK_SECONDS} s; another server is left",
        "wire",
        _stuck_forward,
        "a retry, logged; the server exits",
    )
    yield Fault("one request of a joined forward breaks it", "wire", _poison, "others nothing")
    yield Fault("more mappings in use than a server keeps", "wire", _crowded, "uploads again")


class Run:
    """A run of batches in order, and the target in this process that says what each has to be."""

    def __init__(self, target: RemoteEagle3TargetModel, tally: Tally) -> None:
        self._target = target
        self._tally = tally
        self._seed = 0
        target.set_vocab_mapping(mapping_of())

    def go_on(self, batches: int = BATCHES_A_ROUND, then: Callable[[], object] | None = None) -> None:
        """Take further batches; something happens after the first of them."""
        items = [rows_of(self._seed + number) for number in range(batches)]
        stream = self._target.prefetch(items, depth=3)
        with RunnerEagle3TargetModel(EmbeddingRunner(), encoding="probs") as oracle:
            oracle.set_vocab_mapping(mapping_of())
            for number, item in enumerate(items):
                self._tally.take(lambda: next(stream), oracle.generate_batch(**item))
                if number == 0 and then is not None:
                    then()
        self._seed += batches


@contextlib.contextmanager
def _running(*urls: str, tally: Tally, **options: Any) -> Iterator[Run]:
    with client(*urls, tally=tally, **{"transport": "wire", "encoding": "probs", **options}) as target:
        yield Run(target, tally)


def _slow(tally: Tally, rounds: int) -> None:
    with (
        faulty_server({"delay": 0.1}) as slow,
        faulty_server(DELAY) as first,
        faulty_server(DELAY) as second,
        _running(slow.url, first.url, second.url, tally=tally) as run,
    ):
        for _ in range(rounds):
            run.go_on()


def _always_500(tally: Tally, rounds: int) -> None:
    def fail(request: Received, answer: Answer) -> Answer:
        return Answer(500, {"Content-Length": "0"}, b"") if request.path == messages.SUPERVISION else answer

    with (
        faulty_server(DELAY) as good,
        forwarding(good.url, fail) as bad,
        _running(bad.url, good.url, tally=tally) as run,
    ):
        for _ in range(rounds):
            run.go_on()


def _other_model(tally: Tally, rounds: int) -> None:
    with faulty_server({"seed": 1}) as other, faulty_server(DELAY) as first, faulty_server(DELAY) as second:
        for _ in range(rounds):
            with _running(first.url, other.url, second.url, tally=tally, min_servers=2) as run:
                run.go_on()


def _comes_back_other(tally: Tally, rounds: int) -> None:
    with faulty_server(DELAY) as good, faulty_server(DELAY) as other:
        for _ in range(rounds):
            with _running(other.url, good.url, tally=tally) as run:
                run.go_on(then=lambda: _restart(other, seed=1))
            _restart(other, seed=0)


def _restart(server: ServerUnderFault, *, seed: int) -> None:
    server.kill()
    server.runner["seed"] = seed
    server.start()


def _kill(servers: Sequence[ServerUnderFault]) -> None:
    for server in servers:
        server.kill()


def _five_of_six(tally: Tally, rounds: int) -> None:
    with contextlib.ExitStack() as servers:
        running = [servers.enter_context(faulty_server(DELAY)) for _ in range(6)]
        urls = [server.url for server in running]
        for _ in range(rounds):
            with _running(*urls, tally=tally, max_retries=0, retry_timeout=0.0) as run:
                run.go_on(then=lambda: _kill(running[:5]))
            for server in running[:5]:
                server.start()


def _all_gone(tally: Tally, rounds: int) -> None:
    with faulty_server(DELAY) as first, faulty_server(DELAY) as second:
        for number in range(rounds):
            with _running(first.url, second.url, tally=tally, retry_timeout=OUTAGE_SECONDS) as run:
                first.kill()
                second.kill()
                with tally.error():
                    run.go_on(1)
                (first, second)[number % 2].start()
                run.go_on()
            (second, first)[number % 2].start()


def _clock(transport: str) -> Callable[[Tally, int], None]:
    def play(tally: Tally, rounds: int) -> None:
        with (
            server_with_clock(DELAY, channel_lease=1.0) as server,
            _running(server.url, tally=tally, transport=transport) as run,
        ):
            for number in range(rounds):
                run.go_on(then=lambda number=number: setattr(server.offset, "value", JUMPS[number % len(JUMPS)]))  # type: ignore[misc]

    return play


def _killed_engine(tally: Tally, rounds: int) -> None:
    fleet = Fleet(delay=0.002)
    with (
        mock.patch.object(lifecycle, "FIRST_PAUSE_SECONDS", RESTART_SECONDS),
        mock.patch.object(lifecycle, "LONGEST_PAUSE_SECONDS", RESTART_SECONDS),
        mock.patch.object(lifecycle, "RETRY_SECONDS", RESTART_SECONDS),
        served(fleet, max_batch_tokens=16, max_restarts=rounds) as server,
        _running(server.url, tally=tally) as run,
    ):
        for _ in range(rounds):
            run.go_on(then=fleet.loaded[-1].kill)


def _stuck_forward(tally: Tally, rounds: int) -> None:
    with faulty_server(DELAY) as good, faulty_server({"delay": 3600}, forward_timeout=STUCK_SECONDS) as stuck:
        for _ in range(rounds):
            with _running(stuck.url, good.url, tally=tally) as run:
                run.go_on()
            # Ended by itself, and started again as its supervisor would.
            tally.wrong += stuck.join() is None
            stuck.start()


def _poison(tally: Tally, rounds: int) -> None:
    with loopback_server(TestRunner) as server, _running(server.url, tally=tally) as run:
        put_mapping(server.url, mapping_of())
        for number in range(rounds):

            def poison(number: int = number) -> None:
                answer = ask(
                    server.url, "POST", messages.SUPERVISION, body_of(request_of([3], seed=number, poisonous=True))
                )
                tally.wrong += answer.status != 500

            run.go_on(then=poison)


def _crowded(tally: Tally, rounds: int) -> None:
    with faulty_server(DELAY, max_mappings=1) as server, contextlib.ExitStack() as clients:
        runs = [clients.enter_context(_running(server.url, tally=tally)) for _ in range(2)]
        for number in range(rounds):
            put_mapping(server.url, mapping_of(1 + number))
            for run in runs:
                run.go_on()
