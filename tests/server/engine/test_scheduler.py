"""Who is served when: fair between clients, in order within one, bounded, and cut to size."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import pytest
import torch

from eagle_target.errors import Overloaded, Unavailable
from eagle_target.server.engine.job import Call, Job, Part, cut_sequences, select_sequences
from eagle_target.server.engine.outbox import Outbox
from eagle_target.server.engine.scheduler import Scheduler
from tests.server.cases import request_of

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT = 100


def queue_of(max_waiting: int = 1000, *, outbox: Outbox | None = None) -> Scheduler:
    return Scheduler(max_waiting=max_waiting, outbox=outbox or Outbox(1 << 30, 1 << 30))


def job_of(seq_lens: Sequence[int], client: str = "", *, answer_bytes: int = 0) -> Job:
    return Job(request_of(seq_lens), client=client, answer_bytes=answer_bytes, max_part_tokens=LIMIT)


def take(queue: Scheduler, room: int = LIMIT) -> list[Part]:
    work = queue.take(lambda: room)
    assert isinstance(work, list)
    return work


def test_a_client_that_floods_does_not_hold_up_another() -> None:
    queue = queue_of()
    for _ in range(200):
        queue.put(job_of([50], "flood"))
    served: list[str] = []
    for number in range(20):
        if number in (3, 7, 8):
            queue.put(job_of([50], "other"))
        parts = take(queue)
        assert [part.tokens for part in parts] == [50, 50]
        served += sorted(part.job.client for part in parts)
        # In the very forward that is taken next.
        assert served.count("other") == sum(number >= asked for asked in (3, 7, 8))


@pytest.mark.parametrize("sizes", [(10, 50), (50, 10), (7, 100)])
def test_clients_that_all_have_work_get_the_same_tokens(sizes: tuple[int, int]) -> None:
    queue = queue_of()
    for client, size in zip("ab", sizes, strict=True):
        for _ in range(400):
            queue.put(job_of([size], client))
    tokens = {"a": 0, "b": 0}
    for _ in range(20):
        for part in take(queue):
            tokens[part.job.client] += part.tokens
        assert abs(tokens["a"] - tokens["b"]) <= LIMIT
    assert sum(tokens.values()) >= 20 * LIMIT * 0.8


def test_a_client_that_comes_back_has_saved_nothing_up() -> None:
    queue = queue_of()
    for _ in range(40):
        queue.put(job_of([50], "busy"))
    for _ in range(10):
        take(queue)
    for _ in range(10):
        queue.put(job_of([50], "back"))
    assert [sorted(part.job.client for part in take(queue)) for _ in range(5)] == [["back", "busy"]] * 5


def test_a_large_request_is_served_between_others() -> None:
    queue = queue_of()
    queue.put(job_of([60] * 5, "large"))
    for _ in range(3):
        queue.put(job_of([40], "small"))
    forwards = [[(part.job.client, [*part.sequences]) for part in take(queue)] for _ in range(5)]
    assert forwards == [
        [("large", [0]), ("small", [0])],
        [("small", [0]), ("large", [1])],
        [("small", [0]), ("large", [2])],
        [("large", [3])],
        [("large", [4])],
    ]


def test_order_within_a_client_is_kept_where_a_smaller_one_would_fit() -> None:
    queue = queue_of()
    jobs = [job_of([size], "a") for size in (60, 50, 10)]
    for job in jobs:
        queue.put(job)
    assert [part.job for part in take(queue)] == jobs[:1]
    assert [part.job for part in take(queue)] == jobs[1:]


def test_a_full_queue_gives_a_client_with_less_the_place_of_one_with_more() -> None:
    queue = queue_of(4)
    flood = [job_of([10], "flood") for _ in range(4)]
    for job in flood:
        queue.put(job)
    with pytest.raises(Overloaded, match="4 requests wait, the queue holds 4"):
        queue.put(job_of([10], "flood"))
    others = [job_of([10], "other") for _ in range(2)]
    for job in others:
        queue.put(job)
    with pytest.raises(Overloaded):
        queue.put(job_of([10], "other"))
    for job in flood[2:]:
        assert isinstance(job.future.exception(0), Overloaded)
    assert [part.job for part in take(queue)] == [flood[0], others[0], flood[1], others[1]]


def test_no_request_that_was_begun_loses_its_place() -> None:
    queue = queue_of(1)
    queue.put(job_of([60, 60], "a"))
    take(queue)
    assert len(queue) == 0
    queue.put(job_of([60], "b"))
    with pytest.raises(Overloaded):
        queue.put(job_of([60], "c"))
    assert [part.job.client for part in take(queue)] == ["b"]
    assert [part.job.client for part in take(queue)] == ["a"]


def test_calls_and_requests_take_turns() -> None:
    queue = queue_of()
    calls = [Call(lambda _: None) for _ in range(2)]
    for call in calls:
        queue.put(call)
    for _ in range(2):
        queue.put(job_of([LIMIT]))
    kinds = [type(queue.take(lambda: LIMIT)).__name__ for _ in range(4)]
    assert kinds == ["Call", "list", "Call", "list"]


def test_nothing_is_remembered_of_clients_that_are_gone() -> None:
    class Name(str):
        """One that can be referred to weakly."""

    queue = queue_of()
    names: list[weakref.ref[Name]] = []
    for number in range(500):
        name = Name(f"client-{number}")
        names.append(weakref.ref(name))
        queue.put(job_of([10], name))
        (part,) = take(queue)
        part.job.fail(RuntimeError("sent"))
        queue.finish(part)
        del name, part
    # What was given back last is counted at the next look.
    assert sum(name() is not None for name in names) <= 1


def test_only_a_client_without_room_is_passed_over() -> None:
    queue = queue_of(outbox=Outbox(max_bytes=1000, max_client_bytes=100))
    for client in ("slow", "slow", "quick", "quick"):
        queue.put(job_of([30], client, answer_bytes=60))
    first = take(queue)
    assert [part.job.client for part in first] == ["slow", "quick"]
    quick = first.pop()
    quick.job.fail(RuntimeError("sent"))
    queue.finish(quick)
    second = take(queue)
    assert [part.job.client for part in second] == ["quick"]
    slow = first.pop()
    slow.job.future.cancel()
    queue.finish(slow)
    assert [part.job.client for part in take(queue)] == ["slow"]


def test_closing_refuses_what_waits_and_what_comes_back() -> None:
    queue = queue_of()
    begun, waiting = job_of([60, 60], "a"), job_of([60], "a")
    queue.put(begun)
    queue.put(waiting)
    (part,) = take(queue)
    queue.close(Unavailable("closed"))
    queue.put_back(part)
    for job in (begun, waiting):
        assert isinstance(job.future.exception(0), Unavailable)
    assert queue.take(lambda: LIMIT) is None


def test_what_a_request_holds_comes_back_when_none_of_its_parts_is_out() -> None:
    outbox = Outbox(1000, 1000)
    queue = queue_of(outbox=outbox)
    job = job_of([60, 60, 60], answer_bytes=70)
    queue.put(job)
    parts = [part for _ in range(2) for part in take(queue)]
    job.fail(RuntimeError("its first part"))
    queue.finish(parts[0])
    assert outbox.held_bytes == 70
    queue.finish(parts[1])
    assert outbox.held_bytes == 0
    # What was not taken is forgotten.
    queue.put(job_of([10], "other"))
    assert [part.job.client for part in take(queue)] == ["other"]


def test_what_is_given_up_between_its_parts_comes_back_at_the_next_look() -> None:
    outbox = Outbox(1000, 1000)
    queue = queue_of(outbox=outbox)
    job = job_of([60, 60], answer_bytes=70)
    queue.put(job)
    (part,) = take(queue)
    queue.finish(part)
    assert outbox.held_bytes == 70
    job.future.cancel()
    queue.put(job_of([10], "other"))
    take(queue)
    assert outbox.held_bytes == 0


def test_abandoning_answers_what_is_out_as_well() -> None:
    queue = queue_of()
    out, waiting = job_of([60], "a"), job_of([60], "a")
    for job in (out, waiting):
        queue.put(job)
    (part,) = take(queue)
    queue.abandon(Unavailable("stuck"))
    for job in (out, waiting):
        assert isinstance(job.future.exception(0), Unavailable)
    queue.finish(part)
    assert queue.take(lambda: LIMIT) is None


@pytest.mark.parametrize(
    ("seq_lens", "expected"),
    [
        ([5], [[0]]),
        ([50, 50], [[0, 1]]),
        ([50, 51], [[0], [1]]),
        ([500, 1, 99, 1], [[0], [1, 2], [3]]),
        ([1, 500, 1], [[0], [1], [2]]),
    ],
)
def test_requests_are_cut_between_sequences(seq_lens: list[int], expected: list[list[int]]) -> None:
    assert [[*part] for part in cut_sequences(seq_lens, LIMIT)] == expected


def test_a_selection_has_the_sequences_and_their_rows() -> None:
    request = request_of([4, 2, 3], seed=5)
    part = select_sequences(request, [0, 2])
    assert part.seq_lens == (4, 3)
    assert torch.equal(part.input_ids, torch.cat([request.input_ids[:4], request.input_ids[6:]]))
    assert torch.equal(part.row_mask, torch.cat([request.row_mask[:4], request.row_mask[6:]]))
    assert (part.encoding, part.mapping, part.probs_dtype) == ("probs", request.mapping, request.probs_dtype)
    assert select_sequences(request, [0, 1, 2]) is request
