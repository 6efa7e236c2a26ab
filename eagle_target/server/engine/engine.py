"""The engine: one thread that loads the target, takes what waits, runs it, and loads the target again when it died."""

from __future__ import annotations

import gc
import logging
import threading
from typing import TYPE_CHECKING

import torch

from eagle_target.contract.target import ServedTarget, validate_aux_layer_ids
from eagle_target.devices import resolve_device, use_device
from eagle_target.errors import EngineDead
from eagle_target.server.engine.job import Call
from eagle_target.server.engine.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.contract.runner import TargetRunner
    from eagle_target.server.engine.lifecycle import Lifecycle
    from eagle_target.server.engine.scheduler import Scheduler
    from eagle_target.server.engine.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Engine:
    """Owns the runner, and the thread on which it is loaded, called and closed.

    Args:
        load: loads the target. aux_layer_ids: the layers to capture; None for the default.
        max_batch_tokens: of one forward. scheduler: what there is to do. lifecycle: what a failure means.
        watchdog: times every call.

    Attributes:
        has_draft_head: whether rows of the target's head can be handed out.
    """

    def __init__(
        self,
        load: Callable[[], TargetRunner],
        *,
        aux_layer_ids: Sequence[int] | None,
        max_batch_tokens: int,
        scheduler: Scheduler,
        lifecycle: Lifecycle,
        watchdog: Watchdog,
    ) -> None:
        self._load = load
        self._aux_layer_ids = aux_layer_ids
        self._max_batch_tokens = max_batch_tokens
        self._scheduler = scheduler
        self._lifecycle = lifecycle
        self._watchdog = watchdog
        self._closing = threading.Event()
        self._padded_before = 0
        self._pipeline: Pipeline | None = None
        self._thread = threading.Thread(target=self._run, name="eagle-target-engine", daemon=True)
        self.has_draft_head = False

    @property
    def running(self) -> int:
        """Requests in the forward that runs."""
        return 0 if self._pipeline is None else self._pipeline.running

    @property
    def padded_tokens(self) -> int:
        """Tokens computed for padding, with every load so far."""
        return self._padded_before + (0 if self._pipeline is None else self._pipeline.padded_tokens)

    def start(self) -> None:
        """Load the target and begin to work."""
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Wait until the target is released; the scheduler is closed. Safe to call twice."""
        self._closing.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        self._live()
        while self._lifecycle.pause is not None and not self._closing.wait(self._lifecycle.pause):
            # Whatever still refers to the engine that died may hold its memory.
            gc.collect()
            self._lifecycle.revive()
            self._live()

    def _live(self) -> None:
        """One life, from loading to release."""
        runner: TargetRunner | None = None
        try:
            runner = self._load()
            self._prepare(runner)
            device = resolve_device(runner.info.device)
            use_device(device)
            self._pipeline = Pipeline(
                runner,
                device,
                max_batch_tokens=self._max_batch_tokens,
                scheduler=self._scheduler,
                lifecycle=self._lifecycle,
                watchdog=self._watchdog,
            )
            self._work(runner, self._pipeline)
        # Whatever it was, SystemExit of an engine included: a thread that is gone must not look like one that loads.
        except BaseException as error:  # noqa: BLE001
            self._lifecycle.die(error)
        finally:
            if self._pipeline is not None:
                self._pipeline.close()
                self._padded_before, self._pipeline = self.padded_tokens, None
            if runner is not None:
                self._release(runner)

    def _prepare(self, runner: TargetRunner) -> None:
        aux_layer_ids = validate_aux_layer_ids(self._aux_layer_ids, runner.info.num_layers)
        runner.set_aux_layers(aux_layer_ids)
        self.has_draft_head = runner.draft_head(torch.tensor([0])) is not None
        self._lifecycle.loaded(ServedTarget(info=runner.info, aux_layer_ids=aux_layer_ids))

    def _work(self, runner: TargetRunner, pipeline: Pipeline) -> None:
        """Take, forward, project and hand over, until there is nothing more to take."""
        while (work := self._scheduler.take(pipeline.room)) is not None:
            if isinstance(work, Call):
                self._answer(work, runner)
            elif work:
                forwarded = pipeline.forward(work)  # on this thread
                pipeline.project(forwarded)  # on a second one where the runner allows it; hands the answers over, too
                del forwarded
            else:
                pipeline.rest()
                runner.check_alive()
            # While this thread waits it keeps no answer alive.
            del work

    def _answer(self, call: Call, runner: TargetRunner) -> None:
        if not call.future.set_running_or_notify_cancel():
            return
        try:
            with torch.no_grad(), self._watchdog.watching("a call of the engine"):
                call.future.set_result(call.function(runner))
        except EngineDead as error:
            call.future.set_exception(self._lifecycle.note(error))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for it
            call.future.set_exception(error)

    def _release(self, runner: TargetRunner) -> None:
        try:
            with self._watchdog.watching("closing the engine"):
                runner.close()
        except Exception:
            # Of an engine that died; what it leaves behind shows when it is loaded again.
            logger.exception("the engine could not be closed")
