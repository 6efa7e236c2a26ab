"""From parts to answers: forwards on the engine's thread, projections on a second one where the runner allows it."""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from eagle_target.compute.supervise import check_forward, split_forward, store_supervision
from eagle_target.devices import is_numbered, use_device
from eagle_target.errors import AdapterError, ContractError, EagleTargetError, EngineDead, Unavailable
from eagle_target.memory import trim_heap
from eagle_target.protocol.problems import ProblemType
from eagle_target.server.engine.answer import Answer, DeferredSink, HostMemory
from eagle_target.server.log import hide_ids, hide_in_error, log_context

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.runner import TargetForward, TargetRunner
    from eagle_target.server.engine.job import Part
    from eagle_target.server.engine.lifecycle import Lifecycle
    from eagle_target.server.engine.scheduler import Scheduler
    from eagle_target.server.engine.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Pipeline:
    """Runs parts and hands over what they give, in the order in which they were run.

    One forward at most waits to be projected; then the engine's thread waits, because memory would grow.

    Args:
        runner: the target. device: where it runs. max_batch_tokens: of one forward.
        scheduler: told of every part that is over, and where one goes back to that failed beside others.
        lifecycle: told how parts went, and what ends a thread. watchdog: times every call.

    Attributes:
        running: requests in the forward that runs. padded_tokens: computed beside those that were asked for.
    """

    def __init__(
        self,
        runner: TargetRunner,
        device: torch.device,
        *,
        max_batch_tokens: int,
        scheduler: Scheduler,
        lifecycle: Lifecycle,
        watchdog: Watchdog,
    ) -> None:
        self._runner = runner
        self._device = device
        self._max_batch_tokens = max_batch_tokens
        self._scheduler = scheduler
        self._lifecycle = lifecycle
        self._watchdog = watchdog
        # What a runner has projected by itself only has to be copied, which is no call of the runner.
        is_beside = runner.projects or runner.concurrent_head
        self._order = DeviceOrder(device, is_beside=is_beside)
        self._memory = HostMemory(device)
        self._is_at_rest = False
        self.running = 0
        self.padded_tokens = 0
        self._forwarded: queue.Queue[list[ForwardedPart] | None] = queue.Queue(1)
        self._thread: threading.Thread | None = None
        if is_beside:
            self._thread = threading.Thread(target=self._project_beside, name="eagle-target-projection", daemon=True)
            self._thread.start()

    def room(self) -> int:
        """Tokens of the next forward."""
        capacity = self._runner.token_capacity()
        return self._max_batch_tokens if capacity is None else min(self._max_batch_tokens, capacity)

    def forward(self, taken: Sequence[Part]) -> list[ForwardedPart]:
        """Run parts together; returns those to be handed over, failures included.

        Where several fail together they go back to the scheduler, each to be run by itself.
        """
        parts = []
        for part in taken:
            if part.job.is_over:
                self._scheduler.finish(part)
            else:
                parts.append(part)
        if not parts:
            return []
        self._is_at_rest = False
        self.running = len({part.job for part in parts})
        is_alone = len(parts) == 1
        try:
            if sum(part.tokens for part in parts) > self.room():
                # A single part larger than what fits now: what is still to be projected is freed first.
                self._forwarded.join()
            context = parts[0].job.log_context if is_alone else None
            with torch.no_grad(), log_context(context), self._watchdog.watching("a forward"):
                return self._supervise(parts) if self._runner.projects else self._run(parts)
        except Exception as error:  # noqa: BLE001 - logged, and handed to whoever waits
            if is_alone:
                log_failure("a forward failed", error, parts[0])
            release_frames(error)
            if is_alone or isinstance(error, EngineDead):
                return [FailedPart(part=part, error=error) for part in parts]
            for part in parts:
                self._scheduler.put_back(part)
                self._scheduler.finish(part)
            return []
        except BaseException:
            self._stop(parts)
            raise
        finally:
            self.running = 0

    def project(self, forwarded: list[ForwardedPart]) -> None:
        """Project parts that were run and hand them over: here, or on the second thread once it is free."""
        if not forwarded:
            return
        if self._thread is None:
            self._hand_over(forwarded)
        else:
            self._forwarded.put(forwarded)

    def rest(self) -> None:
        """Give back the memory that the work so far has left free; called again and again while there is none."""
        self._memory.trim()
        if not self._is_at_rest:
            trim_heap()
            self._is_at_rest = True

    def close(self) -> None:
        """Hand over what was run, and let go of the memory."""
        if self._thread is not None:
            self._forwarded.put(None)
            self._thread.join()
        self._memory.close()

    def _run(self, parts: Sequence[Part]) -> list[ForwardedPart]:
        started, before = time.perf_counter(), self._runner.computed_tokens
        requests = [part.request() for part in parts]
        counts = [request.tokens for request in requests]
        forward = self._runner.forward_eagle3(
            torch.cat([request.input_ids for request in requests]).to(self._device),
            [length for request in requests for length in request.seq_lens],
        )
        check_forward(forward, sum(counts), self._runner.info)
        mark = self._order.forwarded()
        self._count_padding(parts, before)
        for part in parts:
            part.job.seconds["forward"] += time.perf_counter() - started
        return [
            HiddenPart(part=part, mark=mark, request=request, forward=piece, is_shared=len(parts) > 1)
            for part, request, piece in zip(parts, requests, split_forward(forward, counts), strict=True)
        ]

    def _supervise(self, parts: Sequence[Part]) -> list[ForwardedPart]:
        """Have the runner project, too."""
        before = self._runner.computed_tokens
        answers = [part.job.open_answer(self._memory) for part in parts]
        sinks = [
            DeferredSink(answer.sink(part.sequences, is_shared=len(parts) > 1))
            for part, answer in zip(parts, answers, strict=True)
        ]
        try:
            seconds = self._runner.supervise([part.request() for part in parts], sinks)
        except BaseException:
            self._order.settle()
            raise
        mark = self._order.forwarded()
        self._count_padding(parts, before)
        for part in parts:
            for stage, spent in seconds.items():
                part.job.seconds[stage] += spent
        return [
            SupervisedPart(part=part, mark=mark, answer=answer, sink=sink)
            for part, answer, sink in zip(parts, answers, sinks, strict=True)
        ]

    def _count_padding(self, parts: Sequence[Part], before: int | None) -> None:
        after = self._runner.computed_tokens
        if before is not None and after is not None:
            self.padded_tokens += after - before - sum(part.tokens for part in parts)

    def _project_beside(self) -> None:
        """The second thread; it keeps nothing alive while it waits."""
        use_device(self._device)
        while (forwarded := self._forwarded.get()) is not None:
            self._hand_over(forwarded)
            self._forwarded.task_done()

    def _hand_over(self, forwarded: list[ForwardedPart]) -> None:
        """Answer parts one after the other; what a part holds is let go of with it."""
        is_alone = len(forwarded) == 1
        forwarded.reverse()
        try:
            while forwarded:
                self._answer(forwarded.pop(), is_alone=is_alone)
        # Whatever it was, whoever waits gets an answer, and the engine's thread is not left waiting for this one.
        except BaseException as error:  # noqa: BLE001
            self._stop([each.part for each in forwarded])
            forwarded.clear()
            self._lifecycle.die(error)

    def _answer(self, forwarded: ForwardedPart, *, is_alone: bool) -> None:
        """Project a part, and hand its job's answer over with the last one. One that failed beside others goes back."""
        part = forwarded.part
        try:
            if part.job.is_over:
                return
            with log_context(part.job.log_context), self._watchdog.watching(forwarded.task):
                answer = forwarded.project(self._runner, self._memory, self._order)
        except Exception as error:  # noqa: BLE001 - logged, and handed to whoever waits
            if is_alone and not isinstance(forwarded, FailedPart):
                log_failure("a projection failed", error, part)
            release_frames(error)
            if is_alone or isinstance(error, EngineDead):
                self._fail(part, error)
            else:
                self._scheduler.put_back(part)
        except BaseException:
            part.job.fail(engine_stopped())
            raise
        else:
            self._lifecycle.note(None)
            part.job.finish_part(answer)
        finally:
            self._scheduler.finish(part)

    def _fail(self, part: Part, error: Exception) -> None:
        if isinstance(error, EngineDead):
            # Why an engine died is logged, and told to other clients too.
            hide_in_error(error, part.job.request.input_ids)
        told = self._lifecycle.note(error) or error
        is_ours = isinstance(told, AdapterError | ContractError | Unavailable)
        part.job.fail(told if is_ours else engine_error(told))

    def _stop(self, parts: Sequence[Part]) -> None:
        """What ends a thread leaves no part without an answer."""
        for part in parts:
            part.job.fail(engine_stopped())
            self._scheduler.finish(part)


@dataclass(kw_only=True, slots=True, eq=False)
class ForwardedPart(ABC):
    """A part that was run. mark: where on the device the engine's thread was then."""

    part: Part
    mark: torch.cuda.Event | None = None
    task: ClassVar[str] = "a projection"

    @abstractmethod
    def project(self, runner: TargetRunner, memory: HostMemory, order: DeviceOrder) -> Answer:
        """Put its supervision into its job's answer."""


@dataclass(kw_only=True, slots=True, eq=False)
class HiddenPart(ForwardedPart):
    """A part's hidden states. is_shared: whether other parts' are in the same memory."""

    request: SupervisionRequest
    forward: TargetForward
    is_shared: bool

    def project(self, runner: TargetRunner, memory: HostMemory, order: DeviceOrder) -> Answer:
        """Run the head on the rows that were asked for."""
        started = time.perf_counter()
        answer = self.part.job.open_answer(memory)
        with torch.no_grad(), order.following(self.forward, self.mark):
            sink = answer.sink(self.part.sequences, is_shared=self.is_shared)
            store_supervision(runner, self.request, self.forward, sink)
        self.part.job.seconds["projection"] += time.perf_counter() - started
        return answer


@dataclass(kw_only=True, slots=True, eq=False)
class SupervisedPart(ForwardedPart):
    """What a runner has projected by itself."""

    answer: Answer
    sink: DeferredSink
    task: ClassVar[str] = "copying an answer"

    def project(self, runner: TargetRunner, memory: HostMemory, order: DeviceOrder) -> Answer:  # noqa: ARG002
        """Copy it, where it must be copied."""
        started = time.perf_counter()
        with order.following(None, self.mark):
            # Copies are only queued in here. What is let go of before they are over is the next forward's memory.
            read = self.sink.flush()
        del read
        self.part.job.seconds["projection"] += time.perf_counter() - started
        return self.answer


@dataclass(kw_only=True, slots=True, eq=False)
class FailedPart(ForwardedPart):
    """What a part ran into, by itself or with an engine that is gone."""

    error: Exception

    def project(self, runner: TargetRunner, memory: HostMemory, order: DeviceOrder) -> Answer:  # noqa: ARG002
        """Raise it."""
        raise self.error


class DeviceOrder:
    """Has what follows a forward run after it, and be over before its results leave; nothing to do on a CPU.

    Args:
        device: where forwards run.
        is_beside: whether what follows runs beside the next forward, on a stream of its own.

    Raises:
        ContractError: the device has no number.
    """

    def __init__(self, device: torch.device, *, is_beside: bool) -> None:
        if not is_numbered(device):
            raise ContractError(f"forwards run on {str(device)!r}, another device in each thread: name its number")
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        if self._on_cuda and is_beside:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def forwarded(self) -> torch.cuda.Event | None:
        """Mark the end of the forward that this thread has just queued."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def settle(self) -> None:
        """Wait for the copies that a failure left under way: the memory they go to is then given to others.

        What a broken device says is left out, for the failure is to be told.
        """
        if self._on_cuda:
            with suppress(RuntimeError):
                torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def following(self, forward: TargetForward | None, mark: torch.cuda.Event | None) -> Iterator[None]:
        """Work on a forward's tensors inside; copies to the CPU are complete afterwards."""
        if not self._on_cuda:
            yield
            return
        stream = self._stream or torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            if mark is not None:
                stream.wait_event(mark)
            if forward is not None and self._stream is not None:
                for tensor in (forward.aux_hidden_states, forward.last_hidden_states, forward.logits):
                    if tensor is not None:
                        # The allocator must not give the memory to the next forward before this stream is through.
                        tensor.record_stream(stream)
            try:
                yield
            except BaseException:
                self.settle()
                raise
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(stream)
            done.synchronize()


def engine_stopped() -> EagleTargetError:
    """What a request gets whose thread ended under it."""
    return ProblemType.FAILED.error("the engine stopped on this request")


def engine_error(error: Exception) -> AdapterError:
    """What a request gets whose engine raised what is none of ours."""
    failure = AdapterError(f"the engine failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def log_failure(what: str, error: Exception, part: Part) -> None:
    """Log a part's failure with its frames, as text, since a handler may keep what it is given; ids are hidden."""
    frames = "".join(traceback.format_exception(error)).rstrip()
    with log_context(part.job.log_context):
        logger.error("%s\n%s", what, hide_ids(frames, part.job.request.input_ids))


def release_frames(error: BaseException | None) -> None:
    """Take an error's frames off it: they hold tensors, and other requests' answers, for as long as it is kept."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
