"""Forwards and projections side by side: overlapped, bounded, in order, and ended together."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

import pytest
import torch

from eagle_target.contract.runner import TargetForward
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import AdapterError, Unavailable
from eagle_target.server.engine.answer import Answer, HostMemory
from eagle_target.server.engine.pipeline import DeviceOrder
from eagle_target.server.engine.server import TargetModelServer
from eagle_target.testing.tiny import EmbeddingRunner
from tests.server.cases import (
    HeadRunner,
    TestRunner,
    assert_same_tensors,
    engine,
    expected_of,
    held,
    request_of,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.sinks import Sink

PROJECTION_THREAD = "eagle-target-projection"


class Supervising(EmbeddingRunner):
    """A runner that projects by itself, and puts tensors that are parts of one memory."""

    supervised: list[int]

    def supervise(self, requests: Sequence[SupervisionRequest], sinks: Sequence[Sink]) -> dict[str, float]:
        self.supervised = [*getattr(self, "supervised", []), len(requests)]
        for request, sink in zip(requests, sinks, strict=True):
            made = expected_of(request)
            for name, tensor in made.items():
                sink.put(name, torch.cat([tensor, tensor])[: len(tensor)])
        return {"forward": 0.25, "projection": 0.5}


def test_the_next_forward_runs_while_one_is_projected_and_no_more_than_one_waits() -> None:
    runner = HeadRunner()
    with engine(lambda: runner, max_batch_tokens=4) as server:
        runner.head_gate.clear()
        futures = [server.submit(request_of([4], seed=seed)) for seed in range(5)]
        # One is projected, one waits for that, one has run and waits for the place.
        wait_until(lambda: len(runner.forwards) == 3)
        assert not any(future.done() for future in futures)
        assert server.waiting == 2
        runner.head_gate.set()
        for seed, future in enumerate(futures):
            assert_same_tensors(future.result(30).tensors, expected_of(request_of([4], seed=seed)))
    assert runner.head_threads == {PROJECTION_THREAD}


def test_a_head_that_must_not_run_beside_a_forward_does_not() -> None:
    runner = HeadRunner(concurrent_head=False)
    with engine(lambda: runner, max_batch_tokens=4) as server:
        runner.head_gate.clear()
        futures = [server.submit(request_of([4])) for _ in range(2)]
        wait_until(lambda: runner.projecting)
        assert len(runner.forwards) == 1
        assert PROJECTION_THREAD not in {thread.name for thread in threading.enumerate()}
        runner.head_gate.set()
        for future in futures:
            future.result(30)
    assert runner.head_threads == {"eagle-target-engine"}


@pytest.mark.parametrize("concurrent_head", [False, True])
def test_a_projection_that_fails_beside_others_is_tried_by_itself(concurrent_head: bool) -> None:
    runner = HeadRunner(concurrent_head=concurrent_head)
    requests = [request_of([4], seed=seed) for seed in range(3)]
    with engine(lambda: runner) as server:
        with held(server, runner):
            futures = [server.submit(request) for request in requests]
            runner.head_errors = {3: MemoryError("no room")}
        for request, future in zip(requests, futures, strict=True):
            assert_same_tensors(future.result(30).tensors, expected_of(request))
        assert server.state == "ready"
    assert runner.forwards == [(3,), (4, 4, 4), (4,)]


def test_an_exception_in_the_projection_fails_one_request_and_degrades() -> None:
    runner = HeadRunner()
    with engine(lambda: runner) as server:
        runner.head_errors = {1: MemoryError("no room")}
        with pytest.raises(AdapterError, match="the engine failed: MemoryError: no room"):
            server.submit(request_of([4])).result(30)
        wait_until(lambda: server.state == "degraded")
        server.submit(request_of([4])).result(30)
        wait_until(lambda: server.state == "ready")


def test_what_ends_the_projections_thread_fails_the_server_and_leaves_nobody_waiting() -> None:
    runner = HeadRunner()
    with engine(lambda: runner, max_batch_tokens=4) as server:
        runner.head_gate.clear()
        futures = [server.submit(request_of([4])) for _ in range(6)]
        wait_until(lambda: len(runner.forwards) == 3)
        runner.head_errors = {1: SystemExit("the head is gone")}
        runner.head_gate.set()
        with pytest.raises(Unavailable, match="the engine stopped on this request"):
            futures[0].result(30)
        for future in futures[1:]:
            error = future.exception(30)
            assert error is None or isinstance(error, Unavailable)
        assert sum(future.exception(30) is not None for future in futures) >= 3
        wait_until(lambda: server.state == "failed")
    assert runner.closed


def test_a_request_given_up_while_it_is_projected_costs_nobody_anything() -> None:
    runner = HeadRunner()
    with engine(lambda: runner, max_batch_tokens=4) as server:
        runner.head_gate.clear()
        futures = [server.submit(request_of([4], seed=seed)) for seed in range(4)]
        wait_until(lambda: len(runner.forwards) == 3)
        projected = runner.projecting
        assert futures[0].cancel()
        assert futures[1].cancel()
        runner.head_gate.set()
        for seed in (2, 3):
            assert_same_tensors(futures[seed].result(30).tensors, expected_of(request_of([4], seed=seed)))
        # The one that was being projected and the two that were answered.
        assert runner.projecting == projected + 2
        futures.clear()
        wait_until(lambda: server.outbox.held_bytes == 0)
        assert server.outbox.peak_bytes > 0


def test_closing_while_both_stages_are_busy_answers_what_was_run() -> None:
    runner = HeadRunner()
    server = TargetModelServer(lambda: runner, max_batch_tokens=4)
    server.start()
    wait_until(lambda: server.state == "ready")
    runner.head_gate.clear()
    futures = [server.submit(request_of([4], seed=seed)) for seed in range(5)]
    wait_until(lambda: len(runner.forwards) == 3)
    server.close(timeout=0.01)
    for future in futures[3:]:
        with pytest.raises(Unavailable, match="the server is closed"):
            future.result(30)
    closed_early = runner.closed
    runner.head_gate.set()
    for seed, future in enumerate(futures[:3]):
        assert_same_tensors(future.result(30).tensors, expected_of(request_of([4], seed=seed)))
    server.close()
    assert (closed_early, runner.closed) == (False, True)
    assert PROJECTION_THREAD not in {thread.name for thread in threading.enumerate()}


def test_draining_answers_what_both_stages_have() -> None:
    runner = HeadRunner()
    with engine(lambda: runner, max_batch_tokens=4) as server:
        runner.head_gate.clear()
        futures = [server.submit(request_of([4], seed=seed)) for seed in range(5)]
        wait_until(lambda: len(runner.forwards) == 3)
        server.drain()
        runner.head_gate.set()
        for seed, future in enumerate(futures):
            assert_same_tensors(future.result(30).tensors, expected_of(request_of([4], seed=seed)))


def test_a_request_larger_than_a_forward_is_put_together_from_its_parts() -> None:
    runner = TestRunner()
    large = request_of([5, 3, 9, 1, 1, 4], seed=1)
    with engine(lambda: runner, max_batch_tokens=8) as server:
        with held(server, runner):
            futures = [server.submit(large), server.submit(request_of([2], seed=2))]
        assert_same_tensors(futures[0].result(30).tensors, expected_of(large))
        assert_same_tensors(futures[1].result(30).tensors, expected_of(request_of([2], seed=2)))
    assert runner.forwards == [(3,), (5, 3), (9,), (1, 1, 4, 2)]


def test_a_part_that_fails_fails_its_request_alone() -> None:
    runner = TestRunner()
    large = request_of([5, 3, 9, 1], seed=1, poisonous=True)
    with engine(lambda: runner, max_batch_tokens=8) as server:
        with held(server, runner):
            futures = [server.submit(large), server.submit(request_of([2], seed=2))]
        with pytest.raises(AdapterError, match="a poisonous token"):
            futures[0].result(30)
        assert_same_tensors(futures[1].result(30).tensors, expected_of(request_of([2], seed=2)))


def test_supervision_made_by_the_runner_is_copied_only_where_its_memory_is_shared() -> None:
    runner = Supervising()
    requests = [request_of([5, 2], seed=1), request_of([4], seed=2), request_of([30, 30], seed=3)]
    with engine(lambda: runner, max_batch_tokens=32) as server:
        for request, future in [(request, server.submit(request)) for request in requests]:
            supervised = future.result(30)
            assert_same_tensors(supervised.tensors, expected_of(request))
            assert supervised.timings["forward"] >= 0.25
    assert sum(runner.supervised) == 4


def test_an_answer_shares_no_memory_with_anothers() -> None:
    runner = TestRunner()
    with engine(lambda: runner) as server:
        with held(server, runner):
            futures = [server.submit(request_of([4], seed=seed)) for seed in range(2)]
        aux = [future.result(30).tensors["aux_hidden_states"] for future in futures]
    for tensor in aux:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_an_answer_lies_where_its_channel_wants_it() -> None:
    class Elsewhere(PackedTensors):
        """A transport's own."""

    with engine(TestRunner, max_batch_tokens=4) as server:
        for seq_lens in ([4], [3, 3]):
            supervised = server.submit(request_of(seq_lens), Elsewhere).result(30)
            assert isinstance(supervised.tensors, Elsewhere)
            assert_same_tensors(supervised.tensors, expected_of(request_of(seq_lens)))


def test_a_request_that_does_not_fit_now_waits_for_what_is_projected() -> None:
    class Small(HeadRunner):
        def token_capacity(self) -> int | None:
            return 6

    runner = Small()
    with engine(lambda: runner, max_batch_tokens=100) as server:
        with held(server, runner):
            runner.head_gate.clear()
            futures = [server.submit(request_of([size], seed=size)) for size in (2, 4, 1, 20)]
        wait_until(lambda: runner.forwards == [(3,), (2, 4), (1,)])
        assert runner.entered == 3
        runner.head_gate.set()
        for size, future in zip((2, 4, 1, 20), futures, strict=True):
            assert_same_tensors(future.result(30).tensors, expected_of(request_of([size], seed=size)))
    assert runner.forwards[3:] == [(20,)]


def test_padding_is_counted_where_the_runner_tells() -> None:
    class Padding(TestRunner):
        computed_tokens = 0

        def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
            self.computed_tokens += max(seq_lens) * len(seq_lens)
            return super().forward_eagle3(input_ids, seq_lens)

    with engine(Padding) as server:
        server.submit(request_of([5, 2, 1])).result(30)
        server.submit(request_of([4, 4])).result(30)
        assert server.padded_tokens == 7


def test_room_comes_back_when_the_answer_is_let_go_of() -> None:
    runner = TestRunner()
    request = request_of([8])
    with engine(lambda: runner) as server:
        tensors = server.submit(request, client="a").result(30).tensors
        assert server.outbox.held_bytes == sum(tensor.nbytes for tensor in tensors.values())
        mapping = weakref.ref(tensors)
        del tensors
        wait_until(lambda: mapping() is None)
        wait_until(lambda: server.outbox.held_bytes == 0)


def test_a_cpu_needs_no_order() -> None:
    order = DeviceOrder(torch.device("cpu"), is_beside=True)
    assert order.forwarded() is None
    with order.following(None, order.forwarded()):
        pass


@pytest.mark.gpu
def test_on_cuda_what_follows_a_forward_sees_it_whole_and_is_over_when_it_is_answered() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda:0")
    order, memory = DeviceOrder(device, is_beside=True), HostMemory(device)
    size = 1 << 12
    for step in range(20):
        left = torch.full((size, size), 1.0 + step, device=device)
        product = left @ torch.eye(size, device=device)
        forward = TargetForward(aux_hidden_states=product, last_hidden_states=left)
        mark = order.forwarded()
        answer = Answer(request_of([size]), PackedTensors(), memory)
        with order.following(forward, mark):
            answer.put("aux_hidden_states", forward.aux_hidden_states, is_shared=False)
        # The next forward takes the memory of this one.
        del forward, product, left
        given = answer.tensors["aux_hidden_states"]
        assert given.is_pinned()
        assert bool((given == 1.0 + step).all())
