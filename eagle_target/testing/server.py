"""Real servers for tests: on a thread of this process, or in a process of their own."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from eagle_target.bench.launching import ServerProcess, run_process
from eagle_target.config import ServerConfig
from eagle_target.errors import BenchmarkError
from eagle_target.server.run import HttpServer
from eagle_target.testing.tiny import EmbeddingRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from eagle_target.contract.runner import TargetRunner

__all__ = ["ServerNotReady", "ServerProcess", "embedding_process", "loopback_server", "server_process"]

POLL_SECONDS = 0.02


class ServerNotReady(Exception):
    """A server under test failed, or was not ready in time; the message has its log."""


@contextlib.contextmanager
def loopback_server(
    load: Callable[[], TargetRunner] = EmbeddingRunner, *, ready_timeout: float = 60.0, **settings: Any
) -> Iterator[HttpServer]:
    """Serve on a free port of this process until the end of the block; ready when it starts.

    Args:
        load: makes the target, on the engine's thread. ready_timeout: seconds it may take.
        settings: of `ServerConfig`.

    Raises:
        ServerNotReady: the target could not be loaded in time.
    """
    config = ServerConfig(**{"model": "loopback", "host": "127.0.0.1", "port": 0, **settings})
    server = HttpServer(config, load)
    try:
        server.start()
        deadline = time.monotonic() + ready_timeout
        while server.engine.state == "loading" and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if server.engine.state != "ready":
            raise ServerNotReady(f"the server is {server.engine.state}: {server.engine.failure or 'not ready in time'}")
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def server_process(
    arguments: Sequence[str],
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    ready_timeout: float = 120.0,
) -> Iterator[ServerProcess]:
    """Run `eagle-target serve ARGUMENTS` on a free port until the end of the block; ready when it starts.

    Args:
        arguments: flags after `serve`; the port's are added. python: interpreter of the engine's environment.
        environment: variables over this process's own.
        ready_timeout: seconds it may take to load.

    Raises:
        ServerNotReady: it ended or was not ready in time.
    """
    command = [python, "-m", "eagle_target", "serve", *arguments, "--port", "0"]
    with _running(lambda port_file: [*command, "--port-file", str(port_file)], environment, ready_timeout) as running:
        yield running


@contextlib.contextmanager
def embedding_process(
    runner: Mapping[str, Any] | None = None, *, ready_timeout: float = 120.0, **settings: Any
) -> Iterator[ServerProcess]:
    """Serve an `EmbeddingRunner` from a process of its own; needs no engine.

    Args:
        runner: arguments of `EmbeddingRunner` that JSON can hold. settings: of `ServerConfig`.

    Raises:
        ServerNotReady: it ended or was not ready in time.
    """

    def command(port_file: Path) -> list[str]:
        config = {"model": "loopback", "port": 0, "port_file": str(port_file), **settings}
        return [sys.executable, "-m", __name__, json.dumps({"settings": config, "runner": dict(runner or {})})]

    with _running(command, None, ready_timeout) as running:
        yield running


@contextlib.contextmanager
def _running(
    command: Callable[[Path], list[str]], environment: Mapping[str, str] | None, ready_timeout: float
) -> Iterator[ServerProcess]:
    with contextlib.ExitStack() as running:
        try:
            server = running.enter_context(
                run_process(command, environment=environment, ready_timeout=ready_timeout, grace=0.0)
            )
        except BenchmarkError as error:
            raise ServerNotReady(str(error)) from error
        yield server


def main() -> None:
    """Serve an `EmbeddingRunner` as the JSON of the first argument says."""
    arguments = json.loads(sys.argv[1])
    HttpServer(ServerConfig(**arguments["settings"]), lambda: EmbeddingRunner(**arguments["runner"])).run()


if __name__ == "__main__":
    main()
