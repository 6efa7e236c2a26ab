"""Live answers, their room in the outbox and their memory: bounded, and nothing of them left when nobody has them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import math
import random
import threading
import weakref
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_inprocess.transport import InProcessClientChannel
from eagle_target_wire.transport import WireServerChannel
from starlette.requests import ClientDisconnect, Request

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.contract.request import SupervisionRequest, answer_bytes
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import AdapterError, EagleTargetError, EngineDead, Overloaded, TransportError
from eagle_target.memory import BufferPool
from eagle_target.plugins.transport import ServerChannel
from eagle_target.protocol import messages
from eagle_target.server.bodies import wait_for_answer
from eagle_target.server.engine import answer, lifecycle
from eagle_target.server.engine.answer import Answer, HostMemory
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import EmbeddingRunner
from tests.client.batches import rows_of
from tests.server.cases import HeadRunner, TestRunner, engine, held, mapping_of, request_of, wait_until
from tests.server.http import ask, assert_problem, body_of, connected, put_mapping

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence

    from eagle_target.server.engine.outbox import Outbox
    from eagle_target.server.engine.server import TargetModelServer


class CountingPool(BufferPool):
    """A pool that counts the bytes which a tensor shares, and makes every tensor in memory of its own."""

    live_bytes = 0
    peak_bytes = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return super().allocate(shape, dtype)
        lease = (ctypes.c_uint8 * size)()
        CountingPool.add(size)
        weakref.finalize(lease, CountingPool.add, -size)
        return torch.frombuffer(lease, dtype=torch.uint8).view(dtype).view(tuple(shape))

    @classmethod
    def add(cls, size: int) -> None:
        cls.live_bytes += size
        cls.peak_bytes = max(cls.peak_bytes, cls.live_bytes)


class Ledger:
    """Every mapping that an answer was made in, for as long as it lives."""

    def __init__(self) -> None:
        self._made: list[weakref.ref[PackedTensors]] = []
        self.made = 0

    def new_tensors(self) -> PackedTensors:
        tensors = PackedTensors()
        self._made.append(weakref.ref(tensors))
        self.made += 1
        return tensors

    @property
    def live(self) -> int:
        self._made = [made for made in self._made if made() is not None]
        return len(self._made)

    def wait_until_empty(self, outbox: Outbox) -> None:
        """Nothing of any answer is left."""
        wait_until(lambda: (self.live, outbox.held_bytes, CountingPool.live_bytes) == (0, 0, 0), "the end of answers")


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setattr(answer, "BufferPool", CountingPool)
    monkeypatch.setattr(CountingPool, "live_bytes", 0)
    monkeypatch.setattr(CountingPool, "peak_bytes", 0)
    made = Ledger()
    monkeypatch.setattr(ServerChannel, "new_tensors", lambda channel: made.new_tensors())
    yield made
    assert made.made, "no answer was counted"


def size_of(request: SupervisionRequest) -> int:
    return answer_bytes(request, EmbeddingRunner().info)


def ask_again_and_again(server: TargetModelServer, ledger: Ledger, client: str, requests: int) -> None:
    """One client's work: two requests on their way, each answer held until the next one."""
    waiting: list[Future[Any]] = []
    for number in range(requests):
        request = request_of([1 + number % 7, 9, 11], seed=number)
        waiting.append(server.submit(request, ledger.new_tensors, client=client))
        if len(waiting) > 1:
            waiting.pop(0).result(30)
    for future in waiting:
        future.result(30)


@pytest.mark.parametrize("concurrent_head", [False, True])
def test_under_load_answers_keep_to_the_outbox_and_leave_nothing(ledger: Ledger, concurrent_head: bool) -> None:
    most = 4 * size_of(request_of([7, 9, 11]))
    runner = TestRunner(concurrent_head=concurrent_head)
    # Requests are joined, and those that are larger than what is left run in parts.
    with engine(lambda: runner, max_batch_tokens=20, max_outbox_bytes=most) as server:
        clients = [
            threading.Thread(target=ask_again_and_again, args=(server, ledger, name, 30), name=name) for name in "abc"
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
        assert ledger.made >= 90
        assert 0 < server.outbox.peak_bytes <= most
        assert 0 < CountingPool.peak_bytes <= most
        ledger.wait_until_empty(server.outbox)


def test_an_answer_that_is_held_is_counted(ledger: Ledger) -> None:
    requests = [request_of([30], seed=seed) for seed in range(3)]
    runner = TestRunner()
    with engine(lambda: runner) as server:
        with held(server, runner) as blocker:
            futures = [server.submit(request, ledger.new_tensors) for request in requests]
        answers = [future.result(30) for future in futures]
        blocker.result(30)
        del blocker, futures
        expected = sum(map(size_of, requests))
        # What was joined was copied.
        wait_until(lambda: (server.outbox.held_bytes, CountingPool.live_bytes) == (expected, expected))
        assert ledger.live == 3
        del answers
        ledger.wait_until_empty(server.outbox)


@pytest.mark.parametrize("concurrent_head", [False, True])
def test_requests_that_are_given_up_anywhere_leave_nothing(ledger: Ledger, concurrent_head: bool) -> None:
    runner = HeadRunner(concurrent_head=concurrent_head)
    with engine(lambda: runner, max_batch_tokens=20) as server:
        for step in range(6):
            runner.gate.clear()
            runner.head_gate.clear()
            before = runner.entered
            # The last one is in three parts.
            futures = [server.submit(request_of([8], seed=seed), ledger.new_tensors) for seed in range(4)]
            futures.append(server.submit(request_of([9, 9, 9], seed=step), ledger.new_tensors))
            wait_until(lambda before=before: runner.entered > before)  # type: ignore[misc]
            if step % 3 == 0:  # in the queue, and in a forward
                cancel(futures)
            runner.gate.set()
            if step % 3 == 1:  # in a projection, and between the two
                wait_until(lambda: runner.projecting)
                cancel(futures)
            runner.head_gate.set()
            if step % 3 == 2:  # a part of it is there, or all of it
                futures[0].result(30)
                cancel(futures)
            for future in futures:
                with contextlib.suppress(CancelledError):
                    future.result(30)
            runner.projecting = 0
            futures.clear()
            del future
            ledger.wait_until_empty(server.outbox)


def cancel(futures: list[Future[Any]]) -> None:
    for future in futures:
        future.cancel()


@pytest.mark.parametrize("concurrent_head", [False, True])
def test_failed_forwards_and_projections_leave_nothing(ledger: Ledger, concurrent_head: bool) -> None:
    runner = HeadRunner(concurrent_head=concurrent_head)
    # Joined ones, ones alone, and one whose second part fails.
    shapes = ([4], [4], [12, 12], [4])
    with engine(lambda: runner, max_batch_tokens=20) as server:
        for step in range(8):
            draw = random.Random(step)
            runner.projecting = 0
            runner.head_errors = {draw.randrange(1, 6): MemoryError("no room")} if step % 2 else {}
            with held(server, runner) as blocker:
                futures = [
                    server.submit(request_of(shape, poisonous=not step % 2 and draw.random() < 0.4), ledger.new_tensors)
                    for shape in shapes
                ]
            for future in (*futures, blocker):
                error = future.exception(30)
                assert error is None or isinstance(error, AdapterError)
            del future, blocker, error
            futures.clear()
            ledger.wait_until_empty(server.outbox)


@pytest.mark.parametrize("death", [EngineDead, SystemExit])
@pytest.mark.parametrize("concurrent_head", [False, True])
def test_an_engine_that_dies_leaves_nothing(
    ledger: Ledger,
    concurrent_head: bool,
    death: type[BaseException],
    short_pauses: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # pytest keeps what is logged, and an error's frames with it.
    caplog.set_level(logging.CRITICAL)
    loaded: list[HeadRunner] = []

    def load() -> HeadRunner:
        loaded.append(HeadRunner(concurrent_head=concurrent_head, poison=death))
        return loaded[-1]

    with engine(load, max_restarts=4, max_batch_tokens=20) as server:
        for round_, kills in enumerate(("forward", "projection")):
            runner = loaded[-1]
            runner.projecting = 0
            if kills == "projection":
                runner.head_errors = {2: death("the head is gone")}
            with held(server, runner) as blocker:
                futures = [
                    server.submit(request_of([9, 9, 9], poisonous=kills == "forward"), ledger.new_tensors),
                    *(server.submit(request_of([4], seed=seed), ledger.new_tensors) for seed in range(5)),
                ]
            for future in (*futures, blocker):
                error = future.exception(30)
                assert error is None or isinstance(error, EagleTargetError)
            del future, blocker, error
            futures.clear()
            runner.head_errors.clear()
            wait_until(lambda round_=round_: server.restarts == round_ + 1 and server.state == "ready")  # type: ignore[misc]
            ledger.wait_until_empty(server.outbox)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "FIRST_PAUSE_SECONDS", 0.01)


def test_a_full_queue_and_a_closed_server_leave_nothing(ledger: Ledger) -> None:
    runner = TestRunner()
    with engine(lambda: runner, max_queue=3, max_batch_tokens=4) as server:
        with held(server, runner) as blocker:
            futures = [server.submit(request_of([4, 4]), ledger.new_tensors, client="flood") for _ in range(3)]
            futures.append(server.submit(request_of([4]), ledger.new_tensors, client="other"))
            assert isinstance(futures[2].exception(30), Overloaded)
        wait_until(lambda: ledger.made)
        server.close()
        for future in (*futures, blocker):
            error = future.exception(30)
            assert error is None or isinstance(error, EagleTargetError)
        del future, blocker, error
        futures.clear()
        ledger.wait_until_empty(server.outbox)


VOCAB_SIZE = 20_000


def large_request() -> SupervisionRequest:
    """Answered with 40 MB, more than sockets buffer."""
    ids = torch.ones(512, dtype=torch.int64)
    return SupervisionRequest(input_ids=ids, seq_lens=(512,), row_mask=ids.bool(), encoding="logits")


def send(connection: socket.socket, request: SupervisionRequest, client: str) -> None:
    body = body_of(request)
    head = f"POST {messages.SUPERVISION} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}{messages.CLIENT}: {client}\r\n\r\n".encode() + body)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """Every answer that is handed over, kept from then on: what it holds is given back if it is released, or never."""
    answers: list[Answer] = []
    hand_over = Answer.hand_over

    def keep(answer: Answer, *arguments: Any) -> None:
        hand_over(answer, *arguments)
        answers.append(answer)

    monkeypatch.setattr(Answer, "hand_over", keep)
    return answers


def test_a_client_that_never_reads_and_one_that_is_gone_leave_nothing(ledger: Ledger, kept: list[Answer]) -> None:
    runner = TestRunner(vocab_size=VOCAB_SIZE)
    with loopback_server(lambda: runner, send_timeout=1.0) as server, contextlib.ExitStack() as running:
        outbox = server.engine.outbox
        silent = [running.enter_context(connected(server.url)) for _ in range(2)]
        for connection in silent:
            send(connection, large_request(), "silent")
        wait_until(lambda: ledger.live == 2)
        assert outbox.held_bytes > 0
        # They are dropped.
        ledger.wait_until_empty(outbox)
        runner.gate.clear()
        entered = runner.entered
        with contextlib.ExitStack() as leaving:
            for number in range(3):
                send(leaving.enter_context(connected(server.url)), large_request(), f"gone-{number}")
            wait_until(lambda: runner.entered > entered)
        runner.gate.set()
        ledger.wait_until_empty(outbox)
        # In the middle of its answer.
        with connected(server.url) as connection:
            send(connection, large_request(), "leaves")
            assert connection.recv(1 << 16)
        ledger.wait_until_empty(outbox)
        assert ask(server.url, "POST", messages.SUPERVISION, body_of(large_request())).status == 200
        ledger.wait_until_empty(outbox)
        assert len(kept) >= 4


def test_an_answer_that_a_transport_cannot_send_is_released(
    ledger: Ledger, kept: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise TransportError("no way through")

    monkeypatch.setattr(WireServerChannel, "send", fail)
    with loopback_server(EmbeddingRunner) as server:
        put_mapping(server.url, mapping_of())
        failed = ask(server.url, "POST", messages.SUPERVISION, body_of(request_of([4])))
        assert_problem(failed, 500, "transport-failed", "no way through")
        # The error and its frames, which had the tensors, refer to one another.
        wait_until(lambda: gc.collect() >= 0 and not ledger.live)
        ledger.wait_until_empty(server.engine.outbox)
        assert len(kept) == 1


def test_an_answer_that_comes_as_its_client_leaves_is_released() -> None:
    async def leave() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    future: Future[Answer] = Future()
    # From here on it cannot be cancelled any more.
    future.set_running_or_notify_cancel()
    with pytest.raises(ClientDisconnect):
        asyncio.run(wait_for_answer(future, Request({"type": "http"}, leave)))
    late = Answer(request_of([4]), PackedTensors(rows=torch.ones(4)), HostMemory(torch.device("cpu")))
    future.set_result(late)
    assert not late.tensors


def test_what_a_transport_holds_for_its_client_is_counted_until_the_client_has_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelved = Shelved(monkeypatch)
    with (
        loopback_server(EmbeddingRunner) as server,
        RemoteEagle3TargetModel.from_urls([server.url], transport="inprocess", encoding="probs") as target,
    ):
        target.set_vocab_mapping(mapping_of())
        future = target.generate_batch_async(**rows_of())
        assert shelved.reached.wait(30)
        # The response is sent, the tensors wait on the shelf.
        assert ledger.live == 1
        assert server.engine.outbox.held_bytes > 0
        shelved.go.set()
        batch = future.result(30)
        del future
        ledger.wait_until_empty(server.engine.outbox)
        del batch


class Shelved:
    """Has the client of transport `inprocess` wait before it takes what lies on its shelf."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        receive: Callable[..., Any] = InProcessClientChannel.receive

        def wait(channel: InProcessClientChannel, *arguments: Any) -> Any:
            self.reached.set()
            assert self.go.wait(30)
            return receive(channel, *arguments)

        monkeypatch.setattr(InProcessClientChannel, "receive", wait)
