"""The engine's life: loaded, worked with, and loaded again when it is dead; all on one thread."""

from __future__ import annotations

import gc
import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from eagle_target.contract.target import ServedTarget, validate_aux_layer_ids
from eagle_target.devices import resolve_device, use_device
from eagle_target.errors import AdapterError, EagleTargetError, EngineDead, ServerError
from eagle_target.memory import trim_heap
from eagle_target.server.engine.answer import HostMemory
from eagle_target.server.engine.answering import AnswerStage
from eagle_target.server.engine.forwards import Forwarded, ForwardStage
from eagle_target.server.engine.job import Call
from eagle_target.server.engine.stages import DeviceOrder, SecondStage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.contract.runner import TargetRunner
    from eagle_target.server.engine.restarts import Restarts
    from eagle_target.server.engine.scheduler import JobQueue
    from eagle_target.server.engine.state import ServerState
    from eagle_target.server.engine.watchdog import Watchdog

logger = logging.getLogger(__name__)

# Requests in a row that failed by themselves, until the engine is tried with tokens that nobody sent.
FAILURES_BEFORE_TRIAL = 3
TRIAL_TOKENS = 2


class EngineLife:
    """Owns the engine.

    Args:
        load: loads the target. aux_layer_ids: the layers to capture; None for the default.
        queue: what there is to do. state: told how it goes. restarts: what an engine that died may have.
        watchdog: times every call. max_batch_tokens: of one forward. on_loaded: called with the runner, before
            the first request.
    """

    def __init__(
        self,
        load: Callable[[], TargetRunner],
        *,
        aux_layer_ids: Sequence[int] | None,
        queue: JobQueue,
        state: ServerState,
        restarts: Restarts,
        watchdog: Watchdog,
        max_batch_tokens: int,
        on_loaded: Callable[[TargetRunner], None],
    ) -> None:
        self._load = load
        self._aux_layer_ids = aux_layer_ids
        self._queue = queue
        self._state = state
        self._restarts = restarts
        self._watchdog = watchdog
        self._max_batch_tokens = max_batch_tokens
        self._on_loaded = on_loaded
        self._dying = threading.Lock()
        self._is_dead = False
        self._pause: float | None = None
        self._closing = threading.Event()
        self._failures = 0
        self._padded_before = 0
        self._forwards: ForwardStage | None = None
        self._thread = threading.Thread(target=self._run, name="eagle-target-engine", daemon=True)

    @property
    def running(self) -> int:
        """Requests in the forward that runs."""
        return 0 if self._forwards is None else self._forwards.running

    @property
    def padded_tokens(self) -> int:
        """Tokens computed for padding, by every engine so far."""
        return self._padded_before + (0 if self._forwards is None else self._forwards.padded_tokens)

    def start(self) -> None:
        """Load the target and begin to work."""
        self._thread.start()

    def end(self, timeout: float) -> None:
        """Wait until the engine is released; the queue is closed. Safe to call twice."""
        self._closing.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        self._live()
        while self._pause is not None and not self._closing.wait(self._pause):
            # Whatever still refers to the engine that died may hold its memory.
            gc.collect()
            self._is_dead, self._pause, self._failures = False, None, 0
            self._live()

    def _live(self) -> None:
        """One engine, from its loading to its release."""
        runner: TargetRunner | None = None
        stages: _Stages | None = None
        try:
            runner = self._load()
            self._prepare(runner)
            stages = self._start_stages(runner)
            while self._work(runner, stages):
                pass
        # Whatever it was, SystemExit of an engine included: a thread that is gone must not look like one that loads.
        except BaseException as error:  # noqa: BLE001
            self._die(error)
        finally:
            if stages is not None:
                stages.close()
                self._padded_before, self._forwards = self.padded_tokens, None
            if runner is not None:
                self._release(runner)

    def _prepare(self, runner: TargetRunner) -> None:
        aux_layer_ids = validate_aux_layer_ids(self._aux_layer_ids, runner.info.num_layers)
        runner.set_aux_layers(aux_layer_ids)
        served = ServedTarget(info=runner.info, aux_layer_ids=aux_layer_ids)
        before = self._state.served
        if before is not None and before.fingerprint != served.fingerprint:
            raise _AnotherTarget(
                f"the target that was loaded again is another: fingerprint {served.fingerprint} instead of "
                f"{before.fingerprint} ({'; '.join(before.differences(served)) or 'the same model and sizes'})"
            )
        self._on_loaded(runner)
        self._queue.resume()
        self._state.loaded(served)

    def _start_stages(self, runner: TargetRunner) -> _Stages:
        device = resolve_device(runner.info.device)
        use_device(device)
        # What a runner has projected by itself only has to be copied, which is no call of the runner.
        is_beside = runner.projects or runner.concurrent_head
        answering = AnswerStage(self._queue, self._note, self._die)
        second: SecondStage[Forwarded] = SecondStage(
            answering.handle, answering.abandon, is_threaded=is_beside, device=device
        )
        memory = HostMemory(device)
        self._forwards = ForwardStage(
            runner, memory, DeviceOrder(device, is_beside=is_beside), second, self._watchdog.watching
        )
        return _Stages(self._forwards, second, memory)

    def _work(self, runner: TargetRunner, stages: _Stages) -> bool:
        """Run what comes next; False when closed. Keeps no answer alive while it waits."""
        work = self._queue.take(lambda: self._room(runner))
        if isinstance(work, Call):
            with self._watchdog.watching("a call of the engine"):
                work.answer(runner, self._note_death)
        elif work:
            if sum(part.tokens for part in work) > self._room(runner):
                # A single part larger than what fits now: what the second stage holds is freed first.
                stages.second.wait_until_idle()
            stages.forwards.run(work)
            stages.is_at_rest = False
        else:
            stages.rest()
            if work is not None:
                runner.check_alive()
        return work is not None

    def _room(self, runner: TargetRunner) -> int:
        """Tokens of the next forward."""
        capacity = runner.token_capacity()
        return self._max_batch_tokens if capacity is None else min(self._max_batch_tokens, capacity)

    def _note(self, failure: Exception | None) -> Exception | None:
        """How a request by itself went; returns what its client gets."""
        if isinstance(failure, EngineDead):
            return self._note_death(failure)
        self._state.note(failure)
        self._failures = 0 if failure is None else self._failures + 1
        if self._failures >= FAILURES_BEFORE_TRIAL:
            self._failures = 0
            # Where there is no room for the trial, others wait whose requests are one.
            with suppress(ServerError):
                self._queue.put(Call(self._try_out))
        return failure

    def _note_death(self, failure: EngineDead) -> Exception:
        self._die(failure)
        return self._state.unavailable()

    def _try_out(self, runner: TargetRunner) -> None:
        """Tell an engine that fails at everything from one that was sent what it cannot do."""
        try:
            ids = torch.zeros(TRIAL_TOKENS, dtype=torch.int64, device=torch.device(runner.info.device))
            forward = runner.forward_eagle3(ids, [TRIAL_TOKENS])
            if forward.logits is None:
                runner.compute_logits(forward.last_hidden_states[:1])
        except Exception as error:
            raise EngineDead(
                f"{FAILURES_BEFORE_TRIAL} requests failed in a row, and so did a trial: {type(error).__name__}: {error}"
            ) from error

    def _die(self, error: BaseException) -> None:
        """The engine is gone: refuse what waits, and decide what follows. The first reason stands."""
        with self._dying:
            if self._is_dead:
                return
            self._is_dead = True
            with_traceback = not isinstance(error, EagleTargetError) or logger.isEnabledFor(logging.DEBUG)
            logger.error(
                "the engine stopped: %s: %s", type(error).__name__, error, exc_info=error if with_traceback else None
            )
            reason = str(error) or type(error).__name__
            self._pause = None
            if self._state.is_restartable and not isinstance(error, _AnotherTarget):
                self._pause = self._restarts.take()
            if self._pause is not None:
                turn = f"{self._restarts.recent} of {self._restarts.most} within an hour"
                logger.warning("the engine is loaded again in %g s, restart %s", self._pause, turn)
                self._state.reload(f"{reason} (restart {turn})")
                self._queue.pause(self._state.unavailable())
                return
            self._state.fail(reason, AdapterError if self._state.served is None else EngineDead)
            self._queue.close(self._state.unavailable())

    def _release(self, runner: TargetRunner) -> None:
        try:
            with self._watchdog.watching("closing the engine"):
                runner.close()
        except Exception:
            # Of an engine that died; what it leaves behind shows when it is loaded again.
            logger.exception("the engine could not be closed")


class _AnotherTarget(AdapterError):
    """What was loaded again is not what was served."""


class _Stages:
    """What works with one engine."""

    def __init__(self, forwards: ForwardStage, second: SecondStage[Forwarded], memory: HostMemory) -> None:
        self.forwards = forwards
        self.second = second
        self.memory = memory
        self.is_at_rest = False

    def rest(self) -> None:
        """Give back the memory that the work so far has left free; called again and again while there is none."""
        self.memory.trim()
        if not self.is_at_rest:
            trim_heap()
            self.is_at_rest = True

    def close(self) -> None:
        """Answer what was run, and let go of the memory."""
        self.second.close()
        self.memory.close()
