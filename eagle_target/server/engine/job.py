"""What waits for the engine: requests, in parts of one forward each, and calls."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.contract.request import SupervisionRequest
from eagle_target.contract.sinks import PackedTensors
from eagle_target.server.engine.answer import Answer
from eagle_target.server.log import current_log_context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.contract.runner import TargetRunner
    from eagle_target.server.engine.answer import HostMemory
    from eagle_target.server.engine.outbox import Claim

RETRY_SECONDS = 1.0


class Job:
    """A request that waits for its parts to be answered. Its future is pending, and can be cancelled, until then.

    Args:
        request: what is asked. client: who asks. make_tensors: gives the mapping its supervision goes to.
        answer_bytes: what the answer takes. max_part_tokens: a larger request is cut into parts of whole sequences.

    Attributes:
        log_context: whom the log's lines about it are about, taken from whoever makes it.
        claim, answer: its room in the outbox, and what is made there, until it is handed over or released.
    """

    def __init__(
        self,
        request: SupervisionRequest,
        *,
        client: str = "",
        make_tensors: Callable[[], PackedTensors] = PackedTensors,
        answer_bytes: int = 0,
        max_part_tokens: int,
    ) -> None:
        self.request = request
        self.client = client
        self.log_context = current_log_context()
        self.answer_bytes = answer_bytes
        self.future: Future[Answer] = Future()
        self.claim: Claim | None = None
        self.answer: Answer | None = None
        self.seconds = {"forward": 0.0, "projection": 0.0}
        self.waiting = deque(cut_sequences(request.seq_lens, max_part_tokens))
        self.parts = self._unanswered = len(self.waiting)
        self._make_tensors = make_tensors
        self._queued_at = time.perf_counter()
        self._settling = threading.Lock()

    @property
    def is_over(self) -> bool:
        """Whether it was answered, failed or was given up."""
        return self.future.done()

    @property
    def is_started(self) -> bool:
        """Whether a part of it was taken."""
        return len(self.waiting) < self.parts

    def open_answer(self, memory: HostMemory) -> Answer:
        """Where the supervision goes; a whole request that is run again gets a new one."""
        if self.answer is None or self.parts == 1:
            self.answer = Answer(self.request, self._make_tensors(), memory)
        return self.answer

    def finish_part(self, answer: Answer) -> None:
        """A part is in the answer. With the last one it is handed over to whoever asked."""
        self._unanswered -= 1
        if self._unanswered:
            return
        busy = sum(self.seconds.values())
        timings = {"queue": max(0.0, time.perf_counter() - self._queued_at - busy), **self.seconds}
        with self._settling:
            if self._begin_to_settle():
                claim, self.answer, self.claim = self.claim, None, None
                answer.hand_over(claim, timings)
                self.future.set_result(answer)

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless it is over."""
        with self._settling:
            if self._begin_to_settle():
                self.future.set_exception(error)

    def release(self) -> None:
        """Give back what was not handed over. Safe to call twice."""
        answer, claim = self.answer, self.claim
        self.answer = self.claim = None
        if answer is not None:
            answer.release()
        if claim is not None:
            claim.release()

    def _begin_to_settle(self) -> bool:
        return not self.future.done() and self.future.set_running_or_notify_cancel()


@dataclass(slots=True, eq=False)
class Part:
    """Sequences of a request that share one forward."""

    job: Job
    sequences: range

    @property
    def tokens(self) -> int:
        """Tokens of all of them."""
        return sum(self.job.request.seq_lens[sequence] for sequence in self.sequences)

    def request(self) -> SupervisionRequest:
        """The request for them alone."""
        return select_sequences(self.job.request, self.sequences)


@dataclass(slots=True, eq=False)
class Call:
    """Something else that only the engine's thread may do."""

    function: Callable[[TargetRunner], Any]
    future: Future[Any] = field(default_factory=Future)

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless it was given up."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


def cut_sequences(seq_lens: Sequence[int], max_tokens: int) -> list[range]:
    """Neighbouring sequences together up to `max_tokens`; a longer one by itself."""
    parts: list[range] = []
    start = tokens = 0
    for index, length in enumerate(seq_lens):
        if index > start and tokens + length > max_tokens:
            parts.append(range(start, index))
            start, tokens = index, 0
        tokens += length
    return [*parts, range(start, len(seq_lens))]


def select_sequences(request: SupervisionRequest, sequences: Sequence[int]) -> SupervisionRequest:
    """The same request for some of its sequences, in ascending order."""
    if len(sequences) == len(request.seq_lens):
        return request
    starts = [0, *accumulate(request.seq_lens)]
    spans = [slice(starts[sequence], starts[sequence + 1]) for sequence in sequences]
    return SupervisionRequest(
        input_ids=torch.cat([request.input_ids[span] for span in spans]),
        seq_lens=tuple(request.seq_lens[sequence] for sequence in sequences),
        row_mask=torch.cat([request.row_mask[span] for span in spans]),
        encoding=request.encoding,
        mapping=request.mapping,
        probs_dtype=request.probs_dtype,
    )
