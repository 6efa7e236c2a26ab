"""The server without HTTP: a bounded queue, one thread that owns the engine, and a batcher."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import OrderedDict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from eagle_target.errors import (
    AdapterError,
    ContractError,
    EagleTargetError,
    Overloaded,
    Unavailable,
    VocabMappingError,
)
from eagle_target.info import ServedTarget
from eagle_target.layers import validate_aux_layer_ids
from eagle_target.rows import PackedTensors
from eagle_target.supervision import check_forward, split_forward, store_supervision

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.runner import DraftHead, TargetForward, TargetRunner
    from eagle_target.supervision import SupervisionRequest
    from eagle_target.vocabulary import VocabMapping

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "degraded", "draining", "failed", "closed"]
SERVING_STATES = ("ready", "degraded")


@dataclass(frozen=True, slots=True)
class Supervised:
    """One request's supervision, packed, and where its time went, in seconds."""

    tensors: PackedTensors
    timings: dict[str, float]


@dataclass(slots=True, eq=False)
class Job:
    """A request that waits for the engine."""

    request: SupervisionRequest
    future: Future[Supervised] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.perf_counter)


@dataclass(slots=True, eq=False)
class Call:
    """Something else that only the engine's thread may do."""

    function: Callable[[TargetRunner], Any]
    future: Future[Any] = field(default_factory=Future)


class TargetModelServer:
    """Answers supervision requests of any number of clients from one target.

    Args:
        load: loads the target; runs on the engine's thread.
        aux_layer_ids: the layers to capture; None for the default.
        max_batch_tokens: requests are joined into one forward up to this many tokens.
        max_queue: requests that may wait.
        max_mappings: vocabulary mappings kept, least recently used out first.
    """

    def __init__(
        self,
        load: Callable[[], TargetRunner],
        *,
        aux_layer_ids: Sequence[int] | None = None,
        max_batch_tokens: int = 8192,
        max_queue: int = 64,
        max_mappings: int = 32,
    ) -> None:
        self._load = load
        self._aux_layer_ids = aux_layer_ids
        self._max_batch_tokens = max_batch_tokens
        self._max_queue = max_queue
        self._max_mappings = max_mappings
        self._mappings: OrderedDict[str, VocabMapping] = OrderedDict()
        self._jobs: deque[Job | Call] = deque()
        self._changed = threading.Condition()
        self._runner: TargetRunner | None = None
        self._served: ServedTarget | None = None
        self._has_draft_head = False
        self.state: State = "loading"
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="eagle-target-engine", daemon=True)

    def start(self) -> None:
        """Load the target and begin to answer, on a thread of its own."""
        self._thread.start()

    @property
    def served(self) -> ServedTarget:
        """What is served.

        Raises:
            Unavailable: the target is not loaded.
        """
        if self._served is None:
            raise Unavailable(self._not_serving(), status=503, problem=self.state, retry_after=1.0)
        return self._served

    @property
    def encodings(self) -> tuple[str, ...]:
        """Encodings this target can answer in."""
        return ("probs", "hidden", "logits") if self._has_draft_head else ("probs", "logits")

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._jobs)

    def submit(self, request: SupervisionRequest) -> Future[Supervised]:
        """Queue a request; cancel the future to give it up.

        Raises:
            ContractError: the target cannot do what is asked.
            Overloaded: the queue is full. Unavailable: loading, draining, failed or closed.
        """
        request.check(self.served.info)
        if request.encoding not in self.encodings:
            raise ContractError(
                f"encoding {request.encoding!r} needs a plain LM head, which this target has not: "
                f"use one of {list(self.encodings)}"
            )
        job = Job(request)
        self._put(job)
        return job.future

    def add_mapping(self, mapping: VocabMapping) -> None:
        """Keep a mapping under its hash.

        Raises:
            VocabMappingError: it is for another vocabulary.
        """
        mapping.check_target(self.served.info.vocab_size)
        with self._changed:
            self._mappings[mapping.sha256] = mapping
            self._mappings.move_to_end(mapping.sha256)
            while len(self._mappings) > self._max_mappings:
                self._mappings.popitem(last=False)

    def find_mapping(self, sha256: str) -> VocabMapping:
        """Return the mapping of a hash.

        Raises:
            VocabMappingError: it is not here; upload it.
        """
        with self._changed:
            if sha256 not in self._mappings:
                raise VocabMappingError(
                    f"this server has no vocabulary mapping {sha256[:64]!r}: PUT it to /v1/vocab-mappings/{{sha256}}"
                )
            self._mappings.move_to_end(sha256)
            return self._mappings[sha256]

    def input_embedding_weight(self) -> Future[torch.Tensor]:
        """The input embedding `[vocab, hidden]`."""
        return self._call(lambda runner: runner.input_embedding_weight())

    def draft_head(self, token_ids: torch.Tensor) -> Future[DraftHead | None]:
        """Rows of the LM head for int64 `[n]` ids, or None."""
        return self._call(lambda runner: runner.draft_head(token_ids))

    def drain(self) -> None:
        """Take no more requests; what is queued is still answered."""
        with self._changed:
            if self.state in SERVING_STATES or self.state == "loading":
                self.state = "draining"

    def close(self, timeout: float = 30.0) -> None:
        """Give up what is queued, stop the thread and release the engine. Safe to call twice."""
        with self._changed:
            self.state = "closed"
            jobs, self._jobs = list(self._jobs), deque()
            self._changed.notify_all()
        _refuse(jobs, Unavailable("the server is closed", status=503, problem="closed"))
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _call(self, function: Callable[[TargetRunner], Any]) -> Future[Any]:
        call = Call(function)
        self._put(call)
        return call.future

    def _put(self, work: Job | Call) -> None:
        with self._changed:
            self._check_serving()
            if len(self._jobs) >= self._max_queue:
                self._jobs = deque(job for job in self._jobs if not job.future.cancelled())
            if len(self._jobs) >= self._max_queue:
                raise Overloaded(
                    f"{len(self._jobs)} requests wait, the queue holds {self._max_queue}: try again, or another server",
                    status=503,
                    problem="queue-full",
                    retry_after=1.0,
                )
            self._jobs.append(work)
            self._changed.notify_all()

    def _check_serving(self) -> None:
        if self.state not in SERVING_STATES:
            raise Unavailable(self._not_serving(), status=503, problem=self.state, retry_after=1.0)

    def _not_serving(self) -> str:
        return f"the server is {self.state}" + (f": {self.failure}" if self.failure else "")

    def _run(self) -> None:
        try:
            self._load_target()
            while self._work():
                pass
        # Whatever it was, SystemExit of an engine included: a thread that is gone must not look like one that loads.
        except BaseException as error:  # noqa: BLE001
            self._give_up(error)
        finally:
            if self._runner is not None:
                self._runner.close()

    def _give_up(self, error: BaseException) -> None:
        with_traceback = not isinstance(error, EagleTargetError) or logger.isEnabledFor(logging.DEBUG)
        logger.error(
            "the engine stopped: %s: %s", type(error).__name__, error, exc_info=error if with_traceback else None
        )
        with self._changed:
            self.failure = str(error) or type(error).__name__
            if self.state != "closed":
                self.state = "failed"
            jobs, self._jobs = list(self._jobs), deque()
        _refuse(jobs, Unavailable(self._not_serving(), status=503, problem=self.state))

    def _load_target(self) -> None:
        runner = self._load()
        self._runner = runner
        aux_layer_ids = validate_aux_layer_ids(self._aux_layer_ids, runner.info.num_layers)
        runner.set_aux_layers(aux_layer_ids)
        self._has_draft_head = runner.draft_head(torch.tensor([0])) is not None
        with self._changed:
            self._served = ServedTarget(info=runner.info, aux_layer_ids=aux_layer_ids)
            if self.state == "loading":
                self.state = "ready"

    def _work(self) -> bool:
        """Answer what comes next; False when closed. Keeps no answer alive while it waits."""
        work = self._take()
        if isinstance(work, Call):
            self._answer_call(work)
        elif work is not None:
            self._answer(work)
        return work is not None

    def _take(self) -> list[Job] | Call | None:
        """Wait for work: requests in order as long as they fit one forward; None when closed."""
        with self._changed:
            while not self._jobs:
                if self.state == "closed":
                    return None
                self._changed.wait()
            first = self._jobs.popleft()
            if isinstance(first, Call):
                return first
            jobs, tokens = [first], first.request.tokens
            while self._jobs and isinstance(follower := self._jobs[0], Job):
                if not follower.future.cancelled():
                    tokens += follower.request.tokens
                    if tokens > self._max_batch_tokens:
                        break
                    jobs.append(follower)
                self._jobs.popleft()
            return jobs

    def _answer_call(self, call: Call) -> None:
        if self._runner is None or not call.future.set_running_or_notify_cancel():
            return
        try:
            with torch.no_grad():
                call.future.set_result(call.function(self._runner))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for it
            call.future.set_exception(error)

    def _answer(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        if not jobs or self._runner is None:
            return
        try:
            self._supervise(self._runner, jobs)
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for it
            self._fail(jobs, error)
        finally:
            # Only what ends this thread leaves some without an answer.
            stopped = Unavailable("the engine stopped on this request", status=503, problem="failed")
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(stopped)

    def _supervise(self, runner: TargetRunner, jobs: list[Job]) -> None:
        started = time.perf_counter()
        with torch.no_grad():
            forwards = self._forward(runner, [job.request for job in jobs])
            forward_seconds = time.perf_counter() - started
            for job, forward in zip(jobs, forwards, strict=True):
                projecting = time.perf_counter()
                tensors = PackedTensors()
                store_supervision(runner, job.request, forward, tensors)
                timings = {
                    "queue": started - job.queued_at,
                    "forward": forward_seconds,
                    "projection": time.perf_counter() - projecting,
                }
                job.future.set_result(Supervised(tensors, timings))
        with self._changed:
            if self.state == "degraded":
                self.state, self.failure = "ready", None

    def _forward(self, runner: TargetRunner, requests: list[SupervisionRequest]) -> list[TargetForward]:
        device = torch.device(runner.info.device)
        counts = [request.tokens for request in requests]
        input_ids = torch.cat([request.input_ids for request in requests]).to(device)
        seq_lens = [length for request in requests for length in request.seq_lens]
        forward = runner.forward_eagle3(input_ids, seq_lens)
        check_forward(forward, sum(counts), runner.info)
        return split_forward(forward, counts)

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        """Answer each request by itself when a joined forward failed, so that one cannot fail the others."""
        waiting = [job for job in jobs if not job.future.done()]
        if len(jobs) > 1:
            _release_frames(error)
            for job in waiting:
                self._answer_alone(job)
            return
        logger.error("a forward failed: %s: %s", type(error).__name__, error, exc_info=error)
        _release_frames(error)
        with self._changed:
            if self.state == "ready":
                self.state, self.failure = "degraded", f"{type(error).__name__}: {error}"
        for job in waiting:
            job.future.set_exception(error if isinstance(error, AdapterError | ContractError) else _engine_error(error))

    def _answer_alone(self, job: Job) -> None:
        try:
            if self._runner is not None:
                self._supervise(self._runner, [job])
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for it
            self._fail([job], error)


def _release_frames(error: BaseException | None) -> None:
    """Let go of a failed forward's tensors, which the error's frames would hold for as long as it is kept."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _refuse(jobs: Sequence[Job | Call], error: Unavailable) -> None:
    for job in jobs:
        if job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)


def _engine_error(error: Exception) -> AdapterError:
    failure = AdapterError(f"the engine failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
