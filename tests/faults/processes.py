"""Servers in processes that start fast, so that a test can kill many; and what a process holds."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import re
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from eagle_target.config import ServerConfig
from eagle_target.server.run import HttpServer
from eagle_target.testing.tiny import EmbeddingRunner
from tests.server.cases import PATIENCE_SECONDS, wait_until
from tests.server.http import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection

    from eagle_target.client.remote import RemoteEagle3TargetModel

# A target whose answers in encoding `logits` are larger than what sockets buffer.
LARGE: dict[str, Any] = {"vocab_size": 20_000}

# Logits of 128 tokens, of which such a target makes 10 MB.
ROWS = {name: torch.ones(4, 32, dtype=torch.int64) for name in ("input_ids", "attention_mask", "loss_mask")}

# Forked from a process that has imported torch already, and runs no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def serve(settings: Mapping[str, Any], runner: Mapping[str, Any]) -> None:
    HttpServer(ServerConfig(model="fault", **settings), lambda: EmbeddingRunner(**runner)).run()


class ServerUnderFault:
    """A server's process on a port that it keeps when it is started again."""

    def __init__(self, runner: Mapping[str, Any] | None = None, **settings: Any) -> None:
        self.runner = dict(runner or {})
        self.port = free_port()
        self._settings = {"port": self.port, **settings}
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        target, arguments = self.program()
        self.process = CONTEXT.Process(target=target, args=(*arguments, self._settings, self.runner), daemon=True)
        self.process.start()
        wait_until(self.is_ready, "the server")

    def program(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        """What the process runs, and the arguments before settings and runner."""
        return serve, ()

    def is_ready(self) -> bool:
        assert self.process.is_alive(), f"the server ended with {self.process.exitcode}"
        with contextlib.suppress(OSError):
            return ask(self.url, "GET", "/ready").status == 200
        return False

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    def freeze(self) -> None:
        """SIGSTOP, until each of its threads has stopped."""
        os.kill(int(self.process.pid or 0), signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")

        def stand_still() -> bool:
            # The state comes after the name in brackets.
            states = [(task / "stat").read_text(encoding="ascii").rpartition(") ")[2][0] for task in tasks.iterdir()]
            return {*states} == {"T"}

        wait_until(stand_still, "all threads of the server to stop")

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(int(self.process.pid or 0), signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.terminate()

    def join(self) -> int | None:
        """Wait for its end and return the exit status."""
        self.process.join(PATIENCE_SECONDS)
        return self.process.exitcode

    def rss(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def fds(self) -> int:
        return int(psutil.Process(self.process.pid).num_fds())

    def connections(self) -> int:
        """TCP connections that clients have with it."""
        held = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(connection.status != psutil.CONN_LISTEN for connection in held)


@contextlib.contextmanager
def faulty_server(runner: Mapping[str, Any] | None = None, **settings: Any) -> Iterator[ServerUnderFault]:
    server = ServerUnderFault(runner, **settings)
    try:
        yield server
    finally:
        server.kill()
        server.process.close()


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """At the end of the block this process has no more threads, sockets or files than at its start."""
    gc.collect()
    process = psutil.Process()
    threads, fds = {*threading.enumerate()}, process.num_fds()
    yield
    gc.collect()
    wait_until(lambda: {*threading.enumerate()} <= threads, f"the end of threads beyond {threads}")
    wait_until(lambda: process.num_fds() <= fds, f"no more than {fds} open files")


def named_memory(maps: Path) -> set[str]:
    """Files of the shared-memory file system that a process has mapped; none of one that has ended."""
    with contextlib.suppress(OSError):
        return set(re.findall(r"/dev/shm/\S+", maps.read_text(encoding="utf-8")))
    return set()


def abandoned_memory() -> set[str]:
    """Files of the shared-memory file system that no process has mapped: what those that ended left behind."""
    # Listed first: what is made meanwhile, by whatever else runs on the machine, is not in it.
    files = {str(path) for path in Path("/dev/shm").iterdir()}
    return files.difference(*map(named_memory, Path("/proc").glob("[0-9]*/maps")))


def take_batch(
    target: RemoteEagle3TargetModel,
    moment: str,
    parent: Connection,
    in_a_transfer: Callable[[Callable[[], object]], AbstractContextManager[object]],
) -> None:
    """Take a batch and tell its total; wait before, during or after it until told to go on."""

    def pause() -> None:
        parent.send("here")
        parent.recv()

    if moment == "before":
        pause()
    with in_a_transfer(pause if moment == "during" else lambda: None):
        batch = target.generate_batch(**ROWS)
    if moment == "after":
        pause()
    parent.send(total_of(batch.logits))


def total_of(logits: torch.Tensor | None) -> float:
    assert logits is not None
    return float(logits.double().sum())


class PausedTrainer:
    """A process that does `train(*arguments, pipe)` up to a moment of `take_batch`, and waits there."""

    def __init__(self, train: Callable[..., None], *arguments: str) -> None:
        self._pipe, child = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=train, args=(*arguments, child), daemon=True)
        self._process.start()
        child.close()
        assert self.hear() == "here"

    def hear(self) -> Any:
        """What it says next."""
        assert self._pipe.poll(PATIENCE_SECONDS), "nothing was heard of a trainer's process"
        return self._pipe.recv()

    def go_on(self) -> None:
        """Past the moment."""
        self._pipe.send("go on")

    def signal(self, number: signal.Signals) -> None:
        """As `kill` does."""
        os.kill(int(self._process.pid or 0), number)

    def end(self) -> None:
        """Wait for its end."""
        self._process.join(PATIENCE_SECONDS)
        self._process.close()
        self._pipe.close()
