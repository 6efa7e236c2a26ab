"""Worker processes of this checkout, whatever environment they run in. Standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eagle_target.bench import processes
from eagle_target.bench.processes import MB, answer_commands, cpu, forget_peak, memory

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MB", "ROOT", "Worker", "answer_commands", "cpu", "forget_peak", "memory"]

ROOT = Path(__file__).resolve().parent.parent


class Worker(processes.Worker):
    """A module of this checkout in a process of its own, started at its root, from where every interpreter finds it."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        python: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(module, *arguments, python=python, environment=environment, folder=ROOT)
