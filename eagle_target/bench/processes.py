"""Worker processes that are told what to do over a pipe, and report what it cost. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from eagle_target.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


MB = 1e6
STOP_SECONDS = 20.0
CLEAR_PEAK = "5"


class Worker:
    """A module run in a process of its own that answers commands, `answer_commands` at its end.

    Args:
        module: run as `python -m module`. arguments: given to it.
        python: the interpreter, so also the environment. environment: variables added to ours.
        folder: where it runs; None for where we do.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        python: Path | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.name = " ".join((module, *arguments))
        self._process = subprocess.Popen(  # noqa: S603 - a module of the caller's
            [str(python or sys.executable), "-m", module, *arguments],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Have a command run and return its answer.

        Raises:
            BenchmarkError: the process is gone; its standard error is on ours.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise BenchmarkError(f"{self.name} has no pipes")
        try:
            self._process.stdin.write(json.dumps([command, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError(f"{self.name} ended with status {self._process.wait()}: its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @property
    def process_id(self) -> int:
        """Its number."""
        return self._process.pid

    def close(self) -> None:
        """End the process: its commands end, then it is given a while, then it is killed."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def answer_commands(handlers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer commands until there are no more; every worker answers `memory` and `cpu`.

    What libraries print to standard output goes to standard error, so that answers stay alone on theirs.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    commands = {"memory": memory, "cpu": cpu, "forget_peak": forget_peak, **handlers}
    for line in sys.stdin:
        command, arguments = json.loads(line)
        answers.write(json.dumps(commands[command](**arguments)) + "\n")
        answers.flush()


def memory() -> dict[str, float]:
    """Resident memory of this process in MB: `rss_mb` now, `peak_rss_mb` at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB
    now, since = read_status("self", "VmRSS"), read_status("self", "VmHWM")
    return {"rss_mb": peak if now is None else now / MB, "peak_rss_mb": peak if since is None else since / MB}


def forget_peak() -> dict[str, float]:
    """Have `peak_rss_mb` count from now on, where the system can; it is Linux that does."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text(CLEAR_PEAK, encoding="ascii")
    return memory()


def cpu() -> dict[str, float]:
    """Processor seconds of this process so far, in and out of the kernel: `cpu_seconds`."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime}


def read_status(process: int | str, name: str) -> int | None:
    """A memory figure of /proc/PROCESS/status in bytes: `VmRSS` now, `VmHWM` at most. None where there is none."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return None
    _, found, rest = status.partition(f"{name}:")
    return int(rest.split()[0]) * 1024 if found else None
