"""The command as users run it: in a process of its own, or, for many small cases, in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Protocol

import pytest

from eagle_target.cli.main import main
from eagle_target.server import log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Command(Protocol):
    """Runs `eagle-target`."""

    def __call__(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        ...


@pytest.fixture(scope="session")
def eagle_target() -> Command:
    """Run `eagle-target ARGUMENTS`, and keep what it prints."""

    def run(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "eagle_target", *arguments],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `eagle-target ARGUMENTS` in this process, which ends with status 1, and return its one line of error."""
    # The log of this process is pytest's.
    monkeypatch.setattr(log, "configure_logging", lambda *_: None)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["eagle-target", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ")
        return lines[-1]

    return run
