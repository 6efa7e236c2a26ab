"""Starts servers in processes of their own, each from its engine's environment, and sees them ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import urllib3

from eagle_target.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

POLL_SECONDS = 0.02
KILL_SECONDS = 10.0
GRACE_SECONDS = 10.0
LOG_CHARACTERS = 8000


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server in a process of its own. url: where it listens. log_path: its stdout and stderr."""

    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")


def serve_command(
    python: str, engine: str, model: str, *, options: Sequence[str] = (), settings: Sequence[str] = ()
) -> list[str]:
    """The command that serves a model under an engine.

    Args:
        python: interpreter of the engine's environment. options: `key=value` of the adapter.
        settings: further flags of `eagle-target serve`.
    """
    given = [word for option in options for word in ("-o", option)]
    return [python, "-m", "eagle_target", "serve", "--engine", engine, "--model", model, *given, *settings]


@contextlib.contextmanager
def run_server(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    ready_timeout: float = 600.0,
    grace: float = GRACE_SECONDS,
) -> Iterator[ServerProcess]:
    """Run a command of `serve_command` on a free port until the end of the block; ready when it starts.

    Args:
        command: the flags of the port are added. environment: variables over this process's own.
        ready_timeout: seconds it may take to load.
        grace: seconds it may take to end when it is told to; then it is killed, with all its processes.

    Raises:
        BenchmarkError: it cannot be run, ended or was not ready in time, with its log.
    """

    def with_port(port_file: Path) -> list[str]:
        return [*command, "--port", "0", "--port-file", str(port_file)]

    with run_process(with_port, environment=environment, ready_timeout=ready_timeout, grace=grace) as running:
        yield running


@contextlib.contextmanager
def run_process(
    command: Callable[[Path], list[str]],
    *,
    environment: Mapping[str, str] | None,
    ready_timeout: float,
    grace: float,
) -> Iterator[ServerProcess]:
    """Like `run_server`, with a command that is made of the path of the file that gets the port."""
    with tempfile.TemporaryDirectory(prefix="eagle-target-") as name:
        folder = Path(name)
        log_path, port_file = folder / "log", folder / "port"
        process = _start(command(port_file), log_path, environment or {})
        try:
            url = _wait_until_ready(process, port_file, log_path, time.monotonic() + ready_timeout)
            yield ServerProcess(url, process, log_path)
        finally:
            _end(process, grace)


def _start(command: Sequence[str], log_path: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log_path.open("wb") as log:
        try:
            return subprocess.Popen(  # noqa: S603 - the caller's own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                # A group of its own, so that what an engine starts can be ended with it.
                start_new_session=True,
            )
        except OSError as error:
            raise BenchmarkError(f"{command[0]} cannot be run: {error}") from error


def _wait_until_ready(process: subprocess.Popen[bytes], port_file: Path, log_path: Path, deadline: float) -> str:
    url, state = "", "no port yet"
    with urllib3.PoolManager(timeout=2.0, retries=False) as http:
        while time.monotonic() < deadline and process.poll() is None:
            if not url and port_file.exists():
                url = f"http://127.0.0.1:{int(port_file.read_text(encoding='ascii'))}"
            if url:
                try:
                    answer = http.request("GET", f"{url}/ready")
                except urllib3.exceptions.HTTPError as error:
                    state = str(error)
                else:
                    if answer.status == 200:
                        return url
                    state = answer.data.decode("utf-8", "replace")
            time.sleep(POLL_SECONDS)
    log = log_path.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]
    raise BenchmarkError(f"the server is not ready ({state}, exit status {process.poll()}); its log:\n{log}")


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a process, then whatever is left of its engine's own processes."""
    if grace and process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(KILL_SECONDS)
