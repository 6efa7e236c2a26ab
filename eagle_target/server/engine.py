"""The server without HTTP: its state, and the one thread that owns the engine."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Literal

import torch

from eagle_target.errors import ContractError, EagleTargetError, Unavailable
from eagle_target.info import ServedTarget
from eagle_target.layers import validate_aux_layer_ids
from eagle_target.rows import PackedTensors
from eagle_target.server.forwards import answer_jobs
from eagle_target.server.jobs import RETRY_SECONDS, Call, Job, JobQueue, Supervised
from eagle_target.server.mappings import MappingStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from eagle_target.runner import DraftHead, TargetRunner
    from eagle_target.supervision import SupervisionRequest
    from eagle_target.vocabulary import VocabMapping

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "degraded", "draining", "failed", "closed"]
SERVING_STATES = ("ready", "degraded")


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
        self._queue = JobQueue(max_waiting=max_queue, max_batch_tokens=max_batch_tokens)
        self._mappings = MappingStore(max_mappings)
        self._changing = threading.Lock()
        self._runner: TargetRunner | None = None
        self._served: ServedTarget | None = None
        self._has_draft_head = False
        self.running = 0
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
            raise self._unavailable(retry_after=RETRY_SECONDS)
        return self._served

    @property
    def encodings(self) -> tuple[str, ...]:
        """Encodings this target can answer in."""
        return ("probs", "hidden", "logits") if self._has_draft_head else ("probs", "logits")

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def submit(
        self, request: SupervisionRequest, make_tensors: Callable[[], PackedTensors] = PackedTensors
    ) -> Future[Supervised]:
        """Queue a request; cancel the future to give it up. `make_tensors` gives the sink its supervision goes to.

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
        job = Job(request, make_tensors)
        self._put(job)
        return job.future

    def add_mapping(self, mapping: VocabMapping) -> None:
        """Keep a mapping under its hash.

        Raises:
            VocabMappingError: it is for another vocabulary.
        """
        mapping.check_target(self.served.info.vocab_size)
        self._mappings.add(mapping)

    def find_mapping(self, sha256: str) -> VocabMapping:
        """Return the mapping of a hash.

        Raises:
            VocabMappingError: it is not here; upload it.
        """
        return self._mappings.find(sha256)

    def input_embedding_weight(self) -> Future[torch.Tensor]:
        """The input embedding `[vocab, hidden]`."""
        return self._call(lambda runner: runner.input_embedding_weight())

    def draft_head(self, token_ids: torch.Tensor) -> Future[DraftHead | None]:
        """Rows of the LM head for int64 `[n]` ids, or None."""
        return self._call(lambda runner: runner.draft_head(token_ids))

    def drain(self) -> None:
        """Take no more requests; what is queued is still answered."""
        with self._changing:
            if self.state in SERVING_STATES or self.state == "loading":
                self.state = "draining"

    def close(self, timeout: float = 30.0) -> None:
        """Give up what is queued, stop the thread and release the engine. Safe to call twice."""
        with self._changing:
            self.state = "closed"
        self._queue.close(Unavailable("the server is closed", status=503, problem="closed"))
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _call(self, function: Callable[[TargetRunner], Any]) -> Future[Any]:
        call = Call(function)
        self._put(call)
        return call.future

    def _put(self, work: Job | Call) -> None:
        if self.state not in SERVING_STATES:
            raise self._unavailable(retry_after=RETRY_SECONDS)
        self._queue.put(work)

    def _unavailable(self, retry_after: float | None = None) -> Unavailable:
        reason = f"the server is {self.state}" + (f": {self.failure}" if self.failure else "")
        return Unavailable(reason, status=503, problem=self.state, retry_after=retry_after)

    def _run(self) -> None:
        try:
            runner = self._load_target()
            while self._work(runner):
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
        with self._changing:
            self.failure = str(error) or type(error).__name__
            if self.state != "closed":
                self.state = "failed"
        self._queue.close(self._unavailable())

    def _load_target(self) -> TargetRunner:
        runner = self._load()
        self._runner = runner
        aux_layer_ids = validate_aux_layer_ids(self._aux_layer_ids, runner.info.num_layers)
        runner.set_aux_layers(aux_layer_ids)
        self._has_draft_head = runner.draft_head(torch.tensor([0])) is not None
        with self._changing:
            self._served = ServedTarget(info=runner.info, aux_layer_ids=aux_layer_ids)
            if self.state == "loading":
                self.state = "ready"
        return runner

    def _work(self, runner: TargetRunner) -> bool:
        """Answer what comes next; False when closed. Keeps no answer alive while it waits."""
        work = self._queue.take()
        if isinstance(work, Call):
            _answer_call(runner, work)
        elif work is not None:
            self._answer(runner, [job for job in work if job.future.set_running_or_notify_cancel()])
        return work is not None

    def _answer(self, runner: TargetRunner, jobs: list[Job]) -> None:
        if not jobs:
            return
        self.running = len(jobs)
        try:
            failure = answer_jobs(runner, jobs)
        finally:
            self.running = 0
            # Only what ends this thread leaves some without an answer.
            stopped = Unavailable("the engine stopped on this request", status=503, problem="failed")
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(stopped)
        with self._changing:
            if self.state in SERVING_STATES:
                self.state = "ready" if failure is None else "degraded"
                self.failure = None if failure is None else f"{type(failure).__name__}: {failure}"


def _answer_call(runner: TargetRunner, call: Call) -> None:
    if not call.future.set_running_or_notify_cancel():
        return
    try:
        with torch.no_grad():
            call.future.set_result(call.function(runner))
    except Exception as error:  # noqa: BLE001 - handed to whoever waits for it
        call.future.set_exception(error)
