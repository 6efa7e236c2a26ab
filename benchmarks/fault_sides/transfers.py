"""Faults of clients, servers and the network between them, for each transport."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Literal

from benchmarks.fault_sides.moments import MOMENTS, in_a_transfer, trainer_at
from benchmarks.fault_sides.tally import Fault, Tally, client
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.protocol import messages
from eagle_target.testing.tiny import EmbeddingRunner
from tests.client.stub import Received, encode, stub
from tests.faults.processes import LARGE, ROWS, ServerUnderFault, faulty_server, total_of
from tests.faults.proxy import proxied
from tests.server.http import ask

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from eagle_target.client.remote import RemoteEagle3TargetModel
    from eagle_target.contract.batch import Eagle3TargetBatch

    Play = Callable[[Tally, int], object]
    # The bytes of an answer -> the bytes that come, after which the connection is closed.
    Change = Callable[[bytes], bytes]

TRANSPORTS = ("wire", "shm", "nccl")
# Shared memory outlives the server that filled it.
AFTER_DEATH = {"wire": "a retry, logged", "nccl": "a retry, logged", "shm": "nothing"}
STOP_SECONDS = 0.5
FROZEN_TIMEOUT = 0.5
RESTART_EVERY = 3
# After the headers, before the end of a body of 10 MB; and within a ticket, which is small.
HALF_WAY = {"wire": 1_000_000, "shm": 1_000, "nccl": 1_000}


def faults() -> Iterator[Fault]:
    """Each fault for each transport that it can meet."""
    with RunnerEagle3TargetModel(EmbeddingRunner(**LARGE), encoding="logits") as target:
        expected = target.generate_batch(**ROWS)
    for transport in TRANSPORTS:
        plays = Plays(transport, expected)
        for moment in MOMENTS:
            yield Fault(
                f"trainer killed {moment} a transfer", transport, plays.killed_trainer(moment), "others see nothing"
            )
        yield Fault(
            f"trainer stopped for {STOP_SECONDS} s", transport, plays.stopped_trainer, "a pause; others nothing"
        )
        yield Fault(
            "server killed in a transfer, another is left", transport, plays.killed_server, AFTER_DEATH[transport]
        )
        yield Fault(
            "only server killed, then started again",
            transport,
            plays.only_server,
            "`ConnectError`, then the batch",
            due="ConnectError",
        )
        yield Fault("server restarted under prefetch", transport, plays.restarted_server, "a pause, logged")
        yield Fault(
            "server frozen, another is left", transport, plays.frozen_server, f"one `timeout` ({FROZEN_TIMEOUT} s here)"
        )
        for how in ("reset", "close"):
            yield Fault(f"HTTP connection {how} in an answer", transport, plays.cut_connection(how), "a retry, logged")
    for what, change in (("a bit of an answer flipped", _flip), ("an answer cut short", _cut_short)):
        yield Fault(what, "wire", Plays("wire", expected).changed_answer(change), "a retry, logged")


def _flip(answer: bytes) -> bytes:
    changed = bytearray(answer)
    changed[len(changed) // 2] ^= 0x10
    return bytes(changed)


def _cut_short(answer: bytes) -> bytes:
    return answer[: len(answer) // 2]


class Plays:
    """The faults of one transport. expected: the batch that is always asked for."""

    def __init__(self, transport: str, expected: Eagle3TargetBatch) -> None:
        self._transport = transport
        self._expected = expected

    def killed_trainer(self, moment: str) -> Play:
        """SIGKILL a trainer; another one's batches are right all the while."""

        def play(tally: Tally, rounds: int) -> None:
            with self._server() as server, self._client(server.url, tally=tally) as bystander:
                for _ in range(rounds):
                    trainer = trainer_at(moment, server.url, self._transport)
                    trainer.signal(signal.SIGKILL)
                    trainer.end()
                    tally.take(lambda: bystander.generate_batch(**ROWS), self._expected)

        return play

    def stopped_trainer(self, tally: Tally, rounds: int) -> None:
        """SIGSTOP a trainer in the middle of a transfer; it gets its batch when it goes on."""
        total = total_of(self._expected.logits)
        with self._server() as server, self._client(server.url, tally=tally) as bystander:
            for _ in range(rounds):
                trainer = trainer_at("during", server.url, self._transport)
                trainer.signal(signal.SIGSTOP)
                trainer.go_on()
                tally.take(lambda: bystander.generate_batch(**ROWS), self._expected)
                time.sleep(STOP_SECONDS)
                trainer.signal(signal.SIGCONT)
                is_right = trainer.hear() == total
                tally.right += is_right
                tally.wrong += not is_right
                trainer.end()

    def killed_server(self, tally: Tally, rounds: int) -> None:
        """SIGKILL the server that sends; the other one answers."""
        with self._server() as victim, self._server() as other:
            for _ in range(rounds):
                # The first of two idle servers is asked.
                with (
                    self._client(victim.url, other.url, tally=tally) as target,
                    in_a_transfer(self._transport, victim.kill),
                ):
                    tally.take(lambda target=target: target.generate_batch(**ROWS), self._expected)  # type: ignore[misc]
                if not victim.process.is_alive():
                    victim.start()

    def only_server(self, tally: Tally, rounds: int) -> None:
        """The batch fails, and is asked for again when the server is back."""
        with self._server() as victim:
            for _ in range(rounds):
                with self._client(victim.url, tally=tally, max_retries=0, retry_timeout=0.0) as target:
                    victim.kill()
                    with tally.error():
                        target.generate_batch(**ROWS)
                    victim.start()
                    tally.compare(target.generate_batch(**ROWS), self._expected)

    def restarted_server(self, tally: Tally, rounds: int) -> None:
        """SIGKILL and start, with batches on their way."""
        with self._server() as victim, self._client(victim.url, tally=tally, max_retries=8) as target:
            stream = target.prefetch([ROWS] * (RESTART_EVERY * rounds), depth=3)
            for number in range(RESTART_EVERY * rounds):
                tally.take(lambda: next(stream), self._expected)
                if number % RESTART_EVERY == 1:
                    victim.kill()
                    victim.start()

    def frozen_server(self, tally: Tally, rounds: int) -> None:
        """SIGSTOP a server; the other one answers."""
        with self._server() as frozen, self._server() as other:
            for _ in range(rounds):
                with self._client(frozen.url, other.url, tally=tally, timeout=FROZEN_TIMEOUT) as target:
                    os.kill(int(frozen.process.pid or 0), signal.SIGSTOP)
                    try:
                        tally.take(lambda target=target: target.generate_batch(**ROWS), self._expected)  # type: ignore[misc]
                    finally:
                        os.kill(int(frozen.process.pid or 0), signal.SIGCONT)

    def cut_connection(self, how: Literal["reset", "close"]) -> Play:
        """The connection that HTTP uses is cut within an answer."""

        def play(tally: Tally, rounds: int) -> None:
            with self._server() as server, proxied(server.url) as proxy:
                for _ in range(rounds):
                    with self._client(proxy.url, tally=tally) as target:
                        proxy.fail_next(how, after=HALF_WAY[self._transport], times=1)
                        tally.take(lambda target=target: target.generate_batch(**ROWS), self._expected)  # type: ignore[misc]
                        proxy.fail_next(how, after=0, times=0)

        return play

    def changed_answer(self, change: Change) -> Play:
        """Something on the way changes one answer of each round."""

        def play(tally: Tally, rounds: int) -> None:
            with self._server() as server:
                for _ in range(rounds):
                    with _between(server.url, change) as url, self._client(url, tally=tally) as target:
                        tally.take(lambda target=target: target.generate_batch(**ROWS), self._expected)  # type: ignore[misc]

        return play

    @contextlib.contextmanager
    def _server(self) -> Iterator[ServerUnderFault]:
        with faulty_server(LARGE, transports=tuple(dict.fromkeys(("wire", self._transport)))) as server:
            yield server

    def _client(
        self, *urls: str, tally: Tally, **options: object
    ) -> contextlib.AbstractContextManager[RemoteEagle3TargetModel]:
        return client(*urls, transport=self._transport, tally=tally, **options)


@contextlib.contextmanager
def _between(url: str, change: Change) -> Iterator[str]:
    """Something between a trainer and a server that changes the first batch that passes."""
    left = [change]

    def respond(request: Received, connection: socket.socket) -> bool:
        headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        answer = encode(ask(url, request.method, request.path, request.body or None, headers))
        if request.path != messages.SUPERVISION or not left:
            connection.sendall(answer)
            return True
        connection.sendall(left.pop()(answer))
        return False

    with stub(respond) as running:
        yield running.url
