"""The queue, the batcher and the engine's thread, without HTTP."""

from __future__ import annotations

import logging
import threading
import weakref
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import pytest
import torch

from eagle_target.errors import AdapterError, ContractError, Overloaded, Unavailable, VocabMappingError
from eagle_target.server.engine.server import TargetModelServer
from eagle_target.testing.tiny import shuffled_mapping
from tests.server.cases import (
    ENGINE_THREAD,
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
    from concurrent.futures import Future

    from eagle_target.contract.runner import TargetRunner


def test_requests_with_different_mappings_and_encodings_share_a_forward() -> None:
    runner = TestRunner()
    requests = [
        request_of([5, 2], seed=1, mapping=mapping_of(1)),
        request_of([4], seed=2, mapping=mapping_of(2, 50)),
        request_of([1, 1, 6], seed=3, encoding="hidden"),
        request_of([9], seed=4, encoding="logits"),
    ]
    with engine(lambda: runner) as server:
        with held(server, runner):
            futures = [server.submit(request) for request in requests]
        for request, future in zip(requests, futures, strict=True):
            supervised = future.result(30)
            assert_same_tensors(supervised.tensors, expected_of(request))
            assert {*supervised.timings} == {"queue", "forward", "projection"}
            assert min(supervised.timings.values()) >= 0
    assert runner.forwards == [(3,), (5, 2, 4, 1, 1, 6, 9)]


def test_requests_are_answered_in_order() -> None:
    runner = TestRunner()
    order: list[int] = []
    with engine(lambda: runner, max_batch_tokens=7) as server:
        with held(server, runner):
            futures = [server.submit(request_of([1 + number % 5], seed=number)) for number in range(12)]
            for number, future in enumerate(futures):
                future.add_done_callback(lambda _, number=number: order.append(number))  # type: ignore[misc]
        futures[-1].result(30)
        wait_until(lambda: len(order) == 12)
    assert order == list(range(12))
    assert [length for lengths in runner.forwards[1:] for length in lengths] == [1 + n % 5 for n in range(12)]
    assert all(sum(lengths) <= 7 for lengths in runner.forwards)


def test_a_forward_takes_up_to_max_batch_tokens_and_a_larger_request_runs_alone() -> None:
    runner = TestRunner()
    with engine(lambda: runner, max_batch_tokens=8) as server:
        with held(server, runner):
            futures = [server.submit(request_of([size])) for size in (4, 4, 1, 20, 2, 6, 9)]
        for future in futures:
            future.result(30)
    assert runner.forwards == [(3,), (4, 4), (1,), (20,), (2, 6), (9,)]


def test_a_full_queue_refuses_and_recovers() -> None:
    runner = TestRunner()
    with engine(lambda: runner, max_queue=2) as server:
        with held(server, runner) as blocker:
            futures = [server.submit(request_of([2])) for _ in range(2)]
            assert server.waiting == 2
            with pytest.raises(Overloaded, match="2 requests wait, the queue holds 2") as caught:
                server.submit(request_of([2]))
            with pytest.raises(Overloaded):
                server.input_embedding_weight()
            assert (caught.value.status, caught.value.problem, caught.value.retry_after) == (503, "queue-full", 1.0)
        for future in (blocker, *futures):
            future.result(30)
        server.submit(request_of([2])).result(30)
        assert server.waiting == 0


def test_cancelled_requests_are_skipped_and_take_no_room() -> None:
    runner = TestRunner()
    with engine(lambda: runner, max_queue=3, max_batch_tokens=8) as server:
        with held(server, runner):
            cancelled = [server.submit(request_of([7])) for _ in range(3)]
            assert all(future.cancel() for future in cancelled)
            kept = [server.submit(request_of([4])) for _ in range(2)]
            late = server.submit(request_of([8]))
            late.cancel()
        for future in kept:
            future.result(30)
        with pytest.raises(CancelledError):
            late.result(30)
    assert runner.forwards == [(3,), (4, 4)]


def test_a_cancelled_request_between_two_others_does_not_keep_them_apart() -> None:
    runner = TestRunner()
    with engine(lambda: runner, max_batch_tokens=8) as server:
        with held(server, runner):
            first, between, last = (server.submit(request_of([4])) for _ in range(3))
            between.cancel()
        first.result(30)
        last.result(30)
    assert runner.forwards == [(3,), (4, 4)]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_poisonous_request_fails_alone(position: int) -> None:
    runner = TestRunner()
    requests = [request_of([4], seed=number, poisonous=number == position) for number in range(3)]
    with engine(lambda: runner) as server:
        with held(server, runner):
            futures = [server.submit(request) for request in requests]
        for number, (request, future) in enumerate(zip(requests, futures, strict=True)):
            if number == position:
                with pytest.raises(AdapterError, match="the engine failed: RuntimeError: a poisonous token"):
                    future.result(30)
            else:
                assert_same_tensors(future.result(30).tensors, expected_of(request))
        last_failed = position == 2
        wait_until(lambda: server.state == ("degraded" if last_failed else "ready"))


def test_a_failed_forward_degrades_until_one_goes_well() -> None:
    runner = TestRunner()
    with engine(lambda: runner) as server:
        with pytest.raises(AdapterError):
            server.submit(request_of([4], poisonous=True)).result(30)
        wait_until(lambda: server.state == "degraded")
        assert server.failure == "RuntimeError: a poisonous token"
        server.submit(request_of([4])).result(30)
        wait_until(lambda: server.state == "ready")
        assert server.failure is None


@pytest.mark.parametrize("kind", [AdapterError, ContractError])
def test_errors_of_ours_keep_their_class(kind: type[Exception]) -> None:
    runner = TestRunner(poison=kind)
    with engine(lambda: runner) as server, pytest.raises(kind, match=r"^a poisonous token$"):
        server.submit(request_of([4], poisonous=True)).result(30)


def test_an_error_does_not_keep_the_failed_forwards_tensors() -> None:
    forwards: list[weakref.ref[torch.Tensor]] = []

    class Failing(TestRunner):
        def forward_eagle3(self, *arguments: Any) -> Any:
            forward = super().forward_eagle3(*arguments)
            forwards.append(weakref.ref(forward.aux_hidden_states))
            return forward

        def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
            raise MemoryError("no memory for logits")

    with engine(Failing) as server:
        future = server.submit(request_of([30]))
        error = future.exception(30)
        assert isinstance(error, AdapterError)
        wait_until(lambda: forwards[0]() is None, "the end of the forward's tensors")


def test_an_idle_engine_keeps_no_answer() -> None:
    with engine(TestRunner) as server:
        future = server.submit(request_of([30]))
        answer = weakref.ref(future.result(30).tensors["aux_hidden_states"])
        del future
        wait_until(lambda: answer() is None, "the end of the answer")


def test_an_engine_that_ends_its_thread_fails_the_server_and_leaves_nobody_waiting() -> None:
    runner = TestRunner(poison=SystemExit)
    with engine(lambda: runner, max_batch_tokens=4) as server:
        with held(server, runner):
            poisonous, queued = server.submit(request_of([4], poisonous=True)), server.submit(request_of([4]))
        for future in (poisonous, queued):
            with pytest.raises(Unavailable) as caught:
                future.result(30)
            assert caught.value.problem == "failed"
        wait_until(lambda: server.state == "failed")
        with pytest.raises(Unavailable, match="the server is failed: a poisonous token"):
            server.submit(request_of([4]))
    assert runner.closed


def test_the_least_recently_used_mapping_goes_first() -> None:
    first, second, third = (mapping_of(seed) for seed in range(3))
    with engine(TestRunner, max_mappings=2) as server:
        server.add_mapping(first)
        server.add_mapping(second)
        server.add_mapping(first)
        server.add_mapping(third)
        assert server.find_mapping(first.sha256) == first
        with pytest.raises(VocabMappingError, match=r"PUT it to /v1/vocab-mappings/\{sha256\}"):
            server.find_mapping(second.sha256)
        server.find_mapping(third.sha256)
        server.find_mapping(first.sha256)
        server.add_mapping(second)
        with pytest.raises(VocabMappingError):
            server.find_mapping(third.sha256)


def test_a_mapping_for_another_vocabulary_is_refused() -> None:
    with (
        engine(TestRunner) as server,
        pytest.raises(VocabMappingError, match="vocabulary of 100, the target's has 211"),
    ):
        server.add_mapping(shuffled_mapping(100, 10))


def test_a_request_the_target_cannot_do_is_refused_at_once() -> None:
    with engine(lambda: TestRunner(max_seq_len=8, plain_head=False)) as server:
        assert server.encodings == ("probs", "logits")
        with pytest.raises(ContractError, match="a sequence has 9 tokens, the target takes 8"):
            server.submit(request_of([9]))
        with pytest.raises(ContractError, match="needs a plain LM head"):
            server.submit(request_of([3], encoding="hidden"))
        assert server.draft_head(torch.tensor([1])).result(30) is None


def test_a_target_that_cannot_be_loaded_fails_the_server_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> TargetRunner:
        raise AdapterError("no such checkpoint")

    with caplog.at_level(logging.ERROR), engine(load, state="failed") as server:
        assert server.failure == "no such checkpoint"
        with pytest.raises(Unavailable, match="the server is failed: no such checkpoint") as caught:
            _ = server.served
        assert caught.value.problem == "failed"
        server.drain()
        assert server.state == "failed"
    assert [record.exc_info for record in caplog.records] == [None]


def test_an_engine_that_exits_while_loading_does_not_look_as_if_it_loaded_on() -> None:
    def load() -> TargetRunner:
        raise SystemExit(3)

    with engine(load, state="failed") as server:
        assert server.failure == "3"


def test_wrong_layers_fail_the_load_and_release_the_target() -> None:
    runner = TestRunner()
    with engine(lambda: runner, state="failed", aux_layer_ids=(1, 2, 99)) as server:
        assert "99" in str(server.failure)
        wait_until(lambda: runner.closed)


def test_nothing_is_answered_while_loading() -> None:
    go = threading.Event()

    def load() -> TargetRunner:
        assert go.wait(30)
        return TestRunner()

    with engine(load, state="loading") as server:
        for ask in (lambda: server.served, lambda: server.submit(request_of([3])), server.input_embedding_weight):
            with pytest.raises(Unavailable, match="the server is loading") as caught:
                ask()
            assert (caught.value.problem, caught.value.retry_after) == ("loading", 1.0)
        go.set()
        wait_until(lambda: server.state == "ready")
        server.submit(request_of([3])).result(30)


@pytest.mark.parametrize("fails", [False, True])
def test_closing_while_loading_releases_what_was_loaded(fails: bool) -> None:
    go = threading.Event()
    runner = TestRunner()

    def load() -> TargetRunner:
        assert go.wait(30)
        if fails:
            raise AdapterError("too late")
        return runner

    server = TargetModelServer(load)
    server.start()
    server.close(timeout=0.01)
    go.set()
    server.close()
    assert server.state == "closed"
    assert runner.closed or fails


def test_closing_answers_whoever_waits() -> None:
    runner = TestRunner()
    server = TargetModelServer(lambda: runner, max_batch_tokens=4)
    server.start()
    wait_until(lambda: server.state == "ready")
    with held(server, runner) as blocker:
        queued = [server.submit(request_of([4])) for _ in range(3)]
        call = server.input_embedding_weight()
        gone = server.submit(request_of([4]))
        gone.cancel()
        server.close(timeout=0.01)
        waiting: list[Future[Any]] = [*queued, call]
        for future in waiting:
            with pytest.raises(Unavailable, match="the server is closed"):
                future.result(30)
    blocker.result(30)
    server.close()
    server.close()
    assert runner.closed
    with pytest.raises(Unavailable, match="closed"):
        server.submit(request_of([4]))


def test_a_server_that_never_started_closes() -> None:
    server = TargetModelServer(TestRunner)
    server.close()
    assert server.state == "closed"


def test_draining_answers_what_is_queued_and_takes_no_more() -> None:
    runner = TestRunner()
    with engine(lambda: runner) as server:
        with held(server, runner) as blocker:
            queued = server.submit(request_of([4]))
            server.drain()
            assert server.state == "draining"
            for ask in (lambda: server.submit(request_of([4])), server.input_embedding_weight):
                with pytest.raises(Unavailable, match="the server is draining") as caught:
                    ask()
                assert caught.value.problem == "draining"
        blocker.result(30)
        assert_same_tensors(queued.result(30).tensors, expected_of(request_of([4])))
        assert server.state == "draining"


def test_a_server_drained_while_loading_does_not_get_ready() -> None:
    go = threading.Event()

    def load() -> TargetRunner:
        assert go.wait(30)
        return TestRunner()

    with engine(load, state="loading") as server:
        server.drain()
        go.set()
        wait_until(lambda: server.served.info.vocab_size == 211 if server.encodings[1] == "hidden" else False)
        assert server.state == "draining"


def test_the_runner_is_called_on_the_engines_thread_only() -> None:
    runner = TestRunner()
    ids = torch.tensor([5, 3, 200])
    with engine(lambda: runner) as server:
        server.submit(request_of([4])).result(30)
        assert torch.equal(server.input_embedding_weight().result(30), TestRunner().input_embedding_weight())
        head = server.draft_head(ids).result(30)
        expected = TestRunner().draft_head(ids)
        assert head is not None
        assert expected is not None
        assert torch.equal(head.weight, expected.weight)
    assert runner.threads == {ENGINE_THREAD}


def test_a_call_that_fails_fails_alone() -> None:
    class Broken(TestRunner):
        def input_embedding_weight(self) -> torch.Tensor:
            raise AdapterError("weights are sharded")

    with engine(Broken) as server:
        with pytest.raises(AdapterError, match="weights are sharded"):
            server.input_embedding_weight().result(30)
        server.submit(request_of([4])).result(30)
        assert server.state == "ready"
