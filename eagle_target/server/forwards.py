"""Answering joined requests on the engine's thread; one bad request fails alone."""

from __future__ import annotations

import logging
import time
import traceback
from typing import TYPE_CHECKING

import torch

from eagle_target.errors import AdapterError, ContractError
from eagle_target.runner import SupervisingRunner
from eagle_target.server.jobs import Supervised
from eagle_target.supervision import check_forward, split_forward, store_supervision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.runner import TargetForward, TargetRunner
    from eagle_target.server.jobs import Job
    from eagle_target.supervision import SupervisionRequest

logger = logging.getLogger(__name__)


def answer_jobs(runner: TargetRunner, jobs: Sequence[Job]) -> Exception | None:
    """Answer every job, joined, or each by itself where the joined forward failed.

    Returns:
        the last failure of a job by itself that no later job's success outweighs; None when the engine is well.
    """
    try:
        with torch.no_grad():
            _supervise(runner, jobs)
    except Exception as error:
        waiting = [job for job in jobs if not job.future.done()]
        release_frames(error)
        if len(jobs) > 1:
            failures = [answer_jobs(runner, [job]) for job in waiting]
            return failures[-1] if failures else None
        logger.exception("a forward failed")
        for job in waiting:
            job.future.set_exception(error if isinstance(error, AdapterError | ContractError) else _engine_error(error))
        return error
    return None


def release_frames(error: BaseException | None) -> None:
    """Let go of a failed forward's tensors, which the error's frames would hold for as long as it is kept."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _supervise(runner: TargetRunner, jobs: Sequence[Job]) -> None:
    started = time.perf_counter()
    if isinstance(runner, SupervisingRunner):
        sinks = [job.make_tensors() for job in jobs]
        seconds = runner.supervise([job.request for job in jobs], sinks)
        for job, tensors in zip(jobs, sinks, strict=True):
            job.future.set_result(Supervised(tensors, {"queue": started - job.queued_at, **seconds}))
        return
    forwards = _forward(runner, [job.request for job in jobs])
    forward_seconds = time.perf_counter() - started
    for job, forward in zip(jobs, forwards, strict=True):
        projecting = time.perf_counter()
        tensors = job.make_tensors()
        store_supervision(runner, job.request, forward, tensors)
        timings = {
            "queue": started - job.queued_at,
            "forward": forward_seconds,
            "projection": time.perf_counter() - projecting,
        }
        job.future.set_result(Supervised(tensors, timings))


def _forward(runner: TargetRunner, requests: Sequence[SupervisionRequest]) -> list[TargetForward]:
    device = torch.device(runner.info.device)
    counts = [request.tokens for request in requests]
    input_ids = torch.cat([request.input_ids for request in requests]).to(device)
    seq_lens = [length for request in requests for length in request.seq_lens]
    forward = runner.forward_eagle3(input_ids, seq_lens)
    check_forward(forward, sum(counts), runner.info)
    return split_forward(forward, counts)


def _engine_error(error: Exception) -> AdapterError:
    failure = AdapterError(f"the engine failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
