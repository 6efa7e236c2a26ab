"""The server without HTTP: its state, the thread that owns the engine, and the one that projects beside it."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Literal

import torch

from eagle_target.answer_size import answer_bytes
from eagle_target.errors import ContractError, EagleTargetError, Unavailable
from eagle_target.info import ServedTarget
from eagle_target.layers import validate_aux_layer_ids
from eagle_target.rows import PackedTensors
from eagle_target.runner import CapacityRunner, ConcurrentHeadRunner, SupervisingRunner
from eagle_target.server.answering import AnswerStage
from eagle_target.server.answers import HostMemory
from eagle_target.server.cache import SequenceCache
from eagle_target.server.forwards import Forwarded, ForwardStage
from eagle_target.server.job_queue import JobQueue
from eagle_target.server.jobs import RETRY_SECONDS, Call, Job, Supervised
from eagle_target.server.mappings import MappingStore
from eagle_target.server.outbox import Outbox
from eagle_target.server.stages import DeviceOrder, SecondStage

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
        max_outbox_bytes, max_client_outbox_bytes: answers that are not sent yet, of all clients and of one.
        cache_bytes: supervision kept for sequences that are asked for again; 0 for none.
    """

    def __init__(
        self,
        load: Callable[[], TargetRunner],
        *,
        aux_layer_ids: Sequence[int] | None = None,
        max_batch_tokens: int = 8192,
        max_queue: int = 64,
        max_mappings: int = 32,
        max_outbox_bytes: int = 8 << 30,
        max_client_outbox_bytes: int = 2 << 30,
        cache_bytes: int = 0,
    ) -> None:
        self._load = load
        self._aux_layer_ids = aux_layer_ids
        self._max_batch_tokens = max_batch_tokens
        self._cache_bytes = cache_bytes
        self._memory: HostMemory | None = None
        self.outbox = Outbox(max_outbox_bytes, max_client_outbox_bytes)
        self._queue = JobQueue(max_waiting=max_queue, outbox=self.outbox)
        self._mappings = MappingStore(max_mappings)
        self._changing = threading.Lock()
        self._runner: TargetRunner | None = None
        self._served: ServedTarget | None = None
        self._has_draft_head = False
        self._forwards: ForwardStage | None = None
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

    @property
    def running(self) -> int:
        """Requests in the forward that runs."""
        return 0 if self._forwards is None else self._forwards.running

    @property
    def padded_tokens(self) -> int:
        """Tokens the engine computed beside those that were asked for, where it tells."""
        return 0 if self._forwards is None else self._forwards.padded_tokens

    @property
    def cache(self) -> SequenceCache | None:
        """Supervision kept for sequences that are asked for again, where it is."""
        return self._queue.cache

    def submit(
        self,
        request: SupervisionRequest,
        make_tensors: Callable[[], PackedTensors] = PackedTensors,
        *,
        client: str = "",
    ) -> Future[Supervised]:
        """Queue a client's request; cancel the future to give it up.

        `make_tensors` gives the mapping its supervision goes to. Whoever holds the mapping holds room in the outbox.

        Raises:
            ContractError: the target cannot do what is asked.
            RequestTooLarge: there will never be room for the answer.
            Overloaded: the queue is full. Unavailable: loading, draining, failed or closed.
        """
        info = self.served.info
        request.check(info)
        if request.encoding not in self.encodings:
            raise ContractError(
                f"encoding {request.encoding!r} needs a plain LM head, which this target has not: "
                f"use one of {list(self.encodings)}"
            )
        size = answer_bytes(request, info)
        self.outbox.check(size)
        job = Job(
            request,
            client=client,
            make_tensors=make_tensors,
            answer_bytes=size,
            keys=() if self.cache is None else self.cache.keys(request),
            max_part_tokens=self._max_batch_tokens,
        )
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
        second: SecondStage[Forwarded] | None = None
        try:
            runner = self._load_target()
            second = self._start_stages(runner)
            while self._work(runner, second):
                pass
        # Whatever it was, SystemExit of an engine included: a thread that is gone must not look like one that loads.
        except BaseException as error:  # noqa: BLE001
            self._give_up(error)
        finally:
            if second is not None:
                second.close()
            if self._memory is not None:
                self._memory.close()
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
        served = ServedTarget(info=runner.info, aux_layer_ids=aux_layer_ids)
        if self._cache_bytes:
            self._queue.cache = SequenceCache(self._cache_bytes, served.fingerprint)
        with self._changing:
            self._served = served
            if self.state == "loading":
                self.state = "ready"
        return runner

    def _start_stages(self, runner: TargetRunner) -> SecondStage[Forwarded]:
        device = torch.device(runner.info.device)
        # What a supervising runner has projected only has to be copied, which is no call of the runner.
        is_beside = isinstance(runner, SupervisingRunner) or (
            isinstance(runner, ConcurrentHeadRunner) and runner.concurrent_head
        )
        answering = AnswerStage(self._queue, self._note, self._give_up)
        second: SecondStage[Forwarded] = SecondStage(answering.handle, answering.abandon, is_threaded=is_beside)
        self._memory = HostMemory(pinned=device.type == "cuda")
        self._forwards = ForwardStage(runner, self._memory, DeviceOrder(device, is_beside=is_beside), second)
        return second

    def _work(self, runner: TargetRunner, second: SecondStage[Forwarded]) -> bool:
        """Run what comes next; False when closed. Keeps no answer alive while it waits."""
        work = self._queue.take(lambda: self._room(runner))
        if isinstance(work, Call):
            work.answer(runner)
        elif work and self._forwards is not None:
            if sum(part.tokens for part in work) > self._room(runner):
                # A single part larger than what fits now: what the second stage holds is freed first.
                second.wait_until_idle()
            self._forwards.run(work)
        elif self._memory is not None:
            self._memory.trim()
        return work is not None

    def _room(self, runner: TargetRunner) -> int:
        """Tokens of the next forward."""
        capacity = runner.token_capacity() if isinstance(runner, CapacityRunner) else None
        return self._max_batch_tokens if capacity is None else min(self._max_batch_tokens, capacity)

    def _note(self, failure: Exception | None) -> None:
        with self._changing:
            if self.state in SERVING_STATES:
                self.state = "ready" if failure is None else "degraded"
                self.failure = None if failure is None else f"{type(failure).__name__}: {failure}"
