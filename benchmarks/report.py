"""Tables for people and one line for programs."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


PIPE_COLUMNS = 180


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text under a title; columns after the first are right-aligned."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    # In a pipe rich takes 80 columns, which breaks words.
    (console if console.is_terminal else Console(width=PIPE_COLUMNS)).print(table)


def print_result(figures: Mapping[str, Any]) -> None:
    """Print the one line that ends a benchmark."""
    print("RESULT " + json.dumps(_rounded(figures)), flush=True)


def describe_machine() -> str:
    """Cores, memory and interpreter."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    load = Path("/proc/loadavg").read_text(encoding="ascii").split()[0] if Path("/proc/loadavg").exists() else "?"
    return (
        f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, load before the run {load}"
    )


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median, and least to most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
