"""Processes that work together: started, told what to do all at once, and watched for the one that dies."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from eagle_target import errors
from eagle_target.errors import AdapterError, EagleTargetError, EngineDead, ProtocolError
from eagle_target_sglang.messages import receive_message, send_message, share

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    Answer = tuple[dict[str, Any], dict[str, torch.Tensor]]

POLL_SECONDS = 0.5
# What the others get to answer once one has failed: they may wait for it in a collective, for ever.
GRACE_SECONDS = 10.0
CLOSE_SECONDS = 10.0
# Between the end of a rank's socket and its exit status: a process with torch in it takes a while to end.
EXIT_SECONDS = 5.0
RANK_MODULE = "eagle_target_sglang.rank"


class RankGroup:
    """One process a rank, each with a socket of its own and a pipe that ends it when this process ends.

    Args:
        count: ranks. module: run as `python -m module SOCKET LIFELINE`, by default the engine's rank.

    Raises:
        EngineDead: from any call, when a rank died or is missing; all of them are then ended.
    """

    def __init__(self, count: int, module: str = RANK_MODULE) -> None:
        self._sockets: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._failure: str | None = None
        lifeline, self._lifeline = os.pipe()
        try:
            for _ in range(count):
                self._start(module, lifeline)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(lifeline)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]

    def call(
        self,
        headers: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> Answer:
        """Tell every rank the same, or each its own, and return what rank 0 answers once all have.

        Raises:
            EagleTargetError: what a rank raised. EngineDead: a rank died, or failed and left the others waiting.
        """
        if self._failure is not None:
            raise EngineDead(self._failure)
        each = [headers] * len(self._sockets) if not isinstance(headers, list | tuple) else list(headers)
        for rank, (peer, header) in enumerate(zip(self._sockets, each, strict=True)):
            try:
                send_message(peer, header, share(tensors or {}))  # type: ignore[arg-type]
            except OSError:
                raise self._give_up(self._describe_end(rank)) from None
        return self._collect()

    def check_alive(self) -> None:
        """See `WatchedRunner.check_alive`; ends the others where one is gone."""
        if self._failure is not None:
            raise EngineDead(self._failure)
        self._check_alive({})

    def close(self) -> None:
        """Ask every rank to end, then end those that did not. Safe to call twice."""
        for peer in self._sockets:
            if self._failure is None:
                with contextlib.suppress(OSError):
                    send_message(peer, {"command": "close"})
        self._end(CLOSE_SECONDS if self._failure is None else 0.0)
        self._failure = self._failure or "the engine's processes are closed: load the target again"

    def _start(self, module: str, lifeline: int) -> None:
        ours, theirs = socket.socketpair()
        try:
            process = start_process(module, theirs.fileno(), lifeline)
        finally:
            theirs.close()
        self._sockets.append(ours)
        self._processes.append(process)

    def _collect(self) -> Answer:
        answers: dict[int, Answer] = {}
        deadline: float | None = None
        with selectors.DefaultSelector() as selector:
            for rank, peer in enumerate(self._sockets):
                selector.register(peer, selectors.EVENT_READ, rank)
            while len(answers) < len(self._sockets):
                for key, _ in selector.select(POLL_SECONDS):
                    answer = self._receive(key.data)
                    answers[key.data] = answer
                    selector.unregister(key.fileobj)
                    if "error" in answer[0]:
                        deadline = deadline or time.monotonic() + GRACE_SECONDS
                self._check_alive(answers)
                if deadline is not None and time.monotonic() > deadline:
                    missing = sorted(set(range(len(self._sockets))) - set(answers))
                    raise self._give_up(
                        f"{_first_error(answers)}; ranks {missing} did not answer after it and were ended"
                    )
        error = _first_error(answers)
        if error is not None:
            raise error
        return answers[0]

    def _receive(self, rank: int) -> Answer:
        try:
            answer = receive_message(self._sockets[rank])
        except (OSError, ProtocolError):
            answer = None
        if answer is None:
            raise self._give_up(self._describe_end(rank))
        return answer

    def _check_alive(self, answers: Mapping[int, Answer]) -> None:
        for rank, process in enumerate(self._processes):
            # One that ended after its answer is found by the next call.
            if process.poll() is not None and rank not in answers:
                raise self._give_up(self._describe_end(rank))

    def _describe_end(self, rank: int) -> str:
        process = self._processes[rank]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_SECONDS)
        status = process.returncode
        how = "its socket" if status is None else f"exit status {status}"
        if status is not None and status < 0:
            how = f"signal {signal.Signals(-status).name}"
        return (
            f"rank {rank} of {len(self._processes)} ended ({how}), what it said is on standard error; the engine is "
            "gone: load the target again"
        )

    def _give_up(self, failure: str) -> EngineDead:
        self._failure = failure
        self._end(0.0)
        return EngineDead(failure)

    def _end(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for peer in self._sockets:
            peer.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def start_process(module: str, peer: int, lifeline: int) -> subprocess.Popen[bytes]:
    """Run `python -m module PEER LIFELINE` with these two descriptors."""
    return subprocess.Popen(  # noqa: S603 - this interpreter, and a module of ours
        [sys.executable, "-m", module, str(peer), str(lifeline)],
        pass_fds=(peer, lifeline),
        stdin=subprocess.DEVNULL,
        # What a rank prints is for people; standard output may be a program's.
        stdout=2,
        # Control-C is this process's to handle: it ends the ranks in order.
        start_new_session=True,
    )


def _first_error(answers: Mapping[int, Answer]) -> EagleTargetError | None:
    for rank in sorted(answers):
        header = answers[rank][0]
        if "error" in header:
            kind = getattr(errors, header["error"], AdapterError)
            message = header["message"] if rank == 0 else f"rank {rank}: {header['message']}"
            return kind(message)
    return None
