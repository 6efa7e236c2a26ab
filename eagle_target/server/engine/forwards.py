"""The first stage: joined parts of requests through the engine, each by itself where that failed."""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from eagle_target.compute.supervise import check_forward, split_forward, store_supervision
from eagle_target.errors import EngineDead
from eagle_target.server.engine.answer import DeferredSink
from eagle_target.server.engine.stages import engine_stopped
from eagle_target.server.log import about, hide_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.runner import TargetForward, TargetRunner
    from eagle_target.server.engine.answer import Answer, HostMemory
    from eagle_target.server.engine.job import Part
    from eagle_target.server.engine.stages import DeviceOrder, SecondStage

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Forwarded:
    """Parts that were run together, and for each how its supervision gets into its answer.

    error: what a part that was run by itself ran into, or all of them where the engine is gone; there is nothing to
        store then.
    """

    parts: Sequence[Part]
    stores: list[Callable[[], Answer]] = field(default_factory=list)
    error: Exception | None = None


class ForwardStage:
    """Runs parts and hands them on to the second stage, failures included, so that all is answered in order.

    Args:
        runner: the target. memory: of answers. order: of the device's work. second: the stage that follows.
        watching: times what is called in it.
    """

    def __init__(
        self,
        runner: TargetRunner,
        memory: HostMemory,
        order: DeviceOrder,
        second: SecondStage[Forwarded],
        watching: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._runner = runner
        self._memory = memory
        self._order = order
        self._second = second
        self._watching = watching
        self.running = 0
        self.padded_tokens = 0

    def run(self, taken: Sequence[Part]) -> None:
        """Run parts together, and each by itself where that fails."""
        parts = [part for part in taken if not part.job.is_over]
        self.running = len({part.job for part in parts})
        try:
            forwarded = self._try(parts)
            if forwarded is not None:
                self._second.put(forwarded)
                return
        except BaseException:
            # Only what ends this thread leaves some without an answer.
            for part in parts:
                part.job.fail(engine_stopped())
            raise
        finally:
            self.running = 0
        for part in parts:
            self.run([part])

    def _try(self, parts: Sequence[Part]) -> Forwarded | None:
        """Run parts together; None where that failed and they are several."""
        subject = parts[0].job.subject if len(parts) == 1 else None
        try:
            with torch.no_grad(), about(subject), self._watching("a forward"):
                return Forwarded(parts, self._forward(parts))
        except Exception as error:  # noqa: BLE001 - logged, and handed to whoever waits
            is_alone = len(parts) == 1
            if is_alone:
                log_failure("a forward failed", error, parts[0])
            release_frames(error)
            return Forwarded(parts, error=error) if is_alone or isinstance(error, EngineDead) else None

    def _forward(self, parts: Sequence[Part]) -> list[Callable[[], Answer]]:
        if not parts:
            return []
        before = self._runner.computed_tokens
        stores = self._supervise(parts) if self._runner.projects else self._run_plain(parts)
        after = self._runner.computed_tokens
        if before is not None and after is not None:
            self.padded_tokens += after - before - sum(part.tokens for part in parts)
        return stores

    def _supervise(self, parts: Sequence[Part]) -> list[Callable[[], Answer]]:
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
        for part in parts:
            for stage, spent in seconds.items():
                part.job.seconds[stage] += spent
        return [
            partial(self._place, part, answer, sink, mark)
            for part, answer, sink in zip(parts, answers, sinks, strict=True)
        ]

    def _run_plain(self, parts: Sequence[Part]) -> list[Callable[[], Answer]]:
        started = time.perf_counter()
        requests = [part.request() for part in parts]
        counts = [request.tokens for request in requests]
        input_ids = torch.cat([request.input_ids for request in requests]).to(torch.device(self._runner.info.device))
        forward = self._runner.forward_eagle3(
            input_ids, [length for request in requests for length in request.seq_lens]
        )
        check_forward(forward, sum(counts), self._runner.info)
        mark = self._order.forwarded()
        for part in parts:
            part.job.seconds["forward"] += time.perf_counter() - started
        return [
            partial(self._project, part, request, piece, mark, is_shared=len(parts) > 1)
            for part, request, piece in zip(parts, requests, split_forward(forward, counts), strict=True)
        ]

    def _place(self, part: Part, answer: Answer, sink: DeferredSink, mark: torch.cuda.Event | None) -> Answer:
        """Copy what the runner has projected, where it must be copied; on the second stage's thread."""
        started = time.perf_counter()
        with self._watching("copying an answer"), self._order.following(None, mark):
            # Copies are only queued in here. What is let go of before they are over is the next forward's memory.
            read = sink.flush()
        del read
        part.job.seconds["projection"] += time.perf_counter() - started
        return answer

    def _project(
        self,
        part: Part,
        request: SupervisionRequest,
        forward: TargetForward,
        mark: torch.cuda.Event | None,
        *,
        is_shared: bool,
    ) -> Answer:
        """Make one part's supervision of its forward; on the second stage's thread."""
        started = time.perf_counter()
        answer = part.job.open_answer(self._memory)
        with torch.no_grad(), self._watching("a projection"), self._order.following(forward, mark):
            store_supervision(self._runner, request, forward, answer.sink(part.sequences, is_shared=is_shared))
        part.job.seconds["projection"] += time.perf_counter() - started
        return answer


def log_failure(what: str, error: Exception, part: Part) -> None:
    """Log a part's failure with its frames, as text, since a handler may keep what it is given; ids are hidden."""
    frames = "".join(traceback.format_exception(error)).rstrip()
    with about(part.job.subject):
        logger.error("%s\n%s", what, hide_ids(frames, part.job.request.input_ids))


def release_frames(error: BaseException | None) -> None:
    """Take an error's frames off it: they hold tensors, and other requests' answers, for as long as it is kept."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
