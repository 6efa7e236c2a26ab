"""Random schedules of clients, failures and changes of mind: every request is answered once, by its own answer."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

import pytest

from eagle_target.errors import AdapterError, EagleTargetError, Overloaded
from tests.server.cases import (
    POISON,
    TestRunner,
    assert_same_tensors,
    engine,
    expected_of,
    mapping_of,
    request_of,
    wait_until,
)

if TYPE_CHECKING:
    import torch

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.server.engine.answer import Answer
    from eagle_target.server.engine.server import TargetModelServer

REQUESTS = 120


class FlakyRunner(TestRunner):
    """A runner some of whose projections fail."""

    __test__ = False

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self._draw = random.Random(seed)

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        if len(self.forwards[-1]) > 1 and self._draw.random() < 0.1:
            raise MemoryError("now and then")
        return super().compute_logits(last_hidden_states)


def random_request(draw: random.Random, number: int) -> SupervisionRequest:
    return request_of(
        [draw.randint(1, 30) for _ in range(draw.randint(1, 5))],
        seed=number % 40,
        mapping=mapping_of(draw.randrange(3)),
        encoding=draw.choice(["probs", "hidden", "logits"]),
        poisonous=draw.random() < 0.1,
    )


class Asker:
    """Asks and keeps what became of every request; its answers are copied, so that they hold no room."""

    def __init__(self, server: TargetModelServer) -> None:
        self._server = server
        self._lock = threading.Lock()
        self.open: dict[int, Future[Answer]] = {}
        self.requests: dict[int, SupervisionRequest] = {}
        self.outcomes: dict[int, list[Any]] = defaultdict(list)

    def ask(self, number: int, request: SupervisionRequest, client: str) -> None:
        future = self._server.submit(request, client=client)
        self.requests[number] = request
        self.open[number] = future
        future.add_done_callback(lambda done: self._settle(number, done))

    def _settle(self, number: int, future: Future[Answer]) -> None:
        outcome: Any
        try:
            outcome = {name: tensor.clone() for name, tensor in future.result().tensors.items()}
        except (CancelledError, EagleTargetError) as error:
            outcome = error.with_traceback(None)
        with self._lock:
            self.outcomes[number].append(outcome)
            self.open.pop(number, None)


@pytest.mark.parametrize("seed", range(6))
def test_every_request_is_answered_once_and_with_its_own_answer(seed: int) -> None:
    draw = random.Random(seed)
    runner = FlakyRunner(seed, concurrent_head=seed % 3 != 0)
    options: dict[str, Any] = {
        "max_batch_tokens": 40,
        "max_queue": 16,
        "max_outbox_bytes": 160_000,
        "max_client_outbox_bytes": 130_000,
    }
    with engine(lambda: runner, **options) as server:
        asker = Asker(server)
        cancelled = set()
        for number in range(REQUESTS):
            request, client = random_request(draw, number), draw.choice("abc")
            while number not in asker.requests:
                try:
                    asker.ask(number, request, client)
                except Overloaded:
                    wait_until(lambda: server.waiting < 16)
            victim = asker.open.get(draw.randrange(number + 1)) if draw.random() < 0.15 else None
            if victim is not None and victim.cancel():
                cancelled.add(victim)
            del victim
        wait_until(lambda: len(asker.outcomes) == REQUESTS, "the last answer")
        wait_until(lambda: server.outbox.held_bytes == 0, "the room of all answers")
        assert 0 < server.outbox.peak_bytes <= 160_000
        gone = sum(isinstance(outcome, CancelledError) for (outcome,) in asker.outcomes.values())
        assert gone == len(cancelled)
    for number, outcomes in asker.outcomes.items():
        check(asker.requests[number], outcomes)


def check(request: SupervisionRequest, outcomes: list[Any]) -> None:
    (outcome,) = outcomes
    poisonous = bool((request.input_ids == POISON).any())
    if isinstance(outcome, AdapterError):
        # Both can happen to a request in several parts.
        assert "now and then" in str(outcome) or (poisonous and "a poisonous token" in str(outcome))
    elif not isinstance(outcome, CancelledError | Overloaded):
        # Overloaded: another client took its place in a full queue.
        assert not poisonous
        assert_same_tensors(outcome, expected_of(request))
