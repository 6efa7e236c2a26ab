"""What was measured, as tables for people and as JSON for programs, and what follows from it: how many servers keep a
trainer busy, and how many batches have to be on their way.
"""

from __future__ import annotations

import math
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eagle_target.bench.measuring import describe
from eagle_target.client.timings import STAGES
from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.bench.measuring import Cell
    from eagle_target.bench.sizes import Sizes
    from eagle_target.verify.workload import Workload

PIPE_COLUMNS = 200
COLUMNS = ("clients", "depth", "tokens/s", "least-most", "slow/fast", "bytes/token", "server MB", "client MB")
SMALL_MS = 10.0
# Of what a server was measured to do, what is counted on.
BUSY_SHARE = 0.9


def console() -> Console:
    """Where tables go; in a pipe wide enough that no word is broken."""
    terminal = Console(highlight=False, markup=False)
    return terminal if terminal.is_terminal else Console(width=PIPE_COLUMNS, highlight=False, markup=False)


def cells_table(cells: Sequence[Cell], workload: Workload) -> Table:
    """A row a combination; what could not be measured has one row for all numbers of clients."""
    table = Table(
        title=f"Batches of {workload.batch} x {workload.seq}, {workload.real_tokens} real tokens, "
        f"{workload.supervised_tokens} supervised",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("target", "transport", "encoding"):
        table.add_column(name, no_wrap=True)
    for name in (*COLUMNS, *(f"{stage} ms" for stage in STAGES)):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in shown(cells):
        named = (cell.endpoint.name, cell.used_transport or cell.transport, cell.encoding)
        if cell.problem is not None:
            table.add_row(*named, "", "", "none", "see below")
            continue
        stages = cell.stage_ms()
        table.add_row(
            *named,
            str(cell.clients),
            str(cell.depth),
            f"{cell.rate:,.0f}",
            f"{min(cell.rates):,.0f}-{max(cell.rates):,.0f}",
            f"{cell.slowest_over_fastest:.2f}" if cell.clients > 1 else "",
            f"{cell.bytes_per_token:,.0f}",
            _megabytes(cell.server_peak_mb),
            _megabytes(cell.client_peak_mb),
            *(_milliseconds(stages.get(stage, 0.0)) for stage in STAGES),
        )
    return table


def shown(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that were measured, and one of each combination that could not be."""
    kept: list[Cell] = []
    failed = set()
    for cell in cells:
        if cell.problem is None:
            kept.append(cell)
        elif cell.combination not in failed:
            failed.add(cell.combination)
            kept.append(cell)
    return kept


def problems(cells: Sequence[Cell]) -> list[str]:
    """Why combinations could not be measured, each once."""
    lines = (f"{' '.join(cell.combination)}: {cell.problem}" for cell in cells if cell.problem is not None)
    return list(dict.fromkeys(lines))


def memory_sources(cells: Sequence[Cell]) -> list[str]:
    """Where each server's memory is known from."""
    sources = {cell.endpoint.name: cell.endpoint.memory for cell in cells}
    return [
        f"{name}: peak of the server from {memory.source}" + ("" if memory.source == "/proc" else ", sampled")
        for name, memory in sources.items()
        if memory is not None
    ]


def sizes_table(sizes: Sequence[Sizes], title: str) -> Table:
    """Bytes a token by model and way."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for name in ("reference", "probs float32", "probs bfloat16", "hidden", "reference / hidden"):
        table.add_column(name, justify="right")
    for row in sizes:
        ways = (row.reference, row.probs_float32, row.probs_bfloat16, row.hidden)
        table.add_row(row.model, *(f"{way:,.0f}" for way in ways), f"{row.reference / row.hidden:.1f}")
    return table


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured.

    batch_tokens: real tokens of a batch. server_tokens: a second, of one server with enough clients.
    latency: seconds from the request to the finished batch of a client that is alone, as nine of ten batches keep to.
    client_seconds: the client's own part of a batch: transfer and assembly. batch_bytes: received for one.
    """

    batch_tokens: int
    server_tokens: float
    latency: float
    client_seconds: float
    batch_bytes: float


@dataclass(frozen=True, kw_only=True)
class Advice:
    """servers, depth: what to use. needed_tokens: a second, of the trainer. busy: share of the servers' time.
    client_busy: share of the step that the client's own part of a batch takes; over 1 the trainer waits all the same.
    waiting_bytes: of the batches that lie ready, or are on their way.
    """

    servers: int
    depth: int
    needed_tokens: float
    busy: float
    client_busy: float
    waiting_bytes: float


def advise(rates: Rates, step_time: float) -> Advice:
    """Advise for a trainer that takes `step_time` seconds a batch. docs/benchmarking.md has the formula.

    Raises:
        ConfigError: the step takes no time.
    """
    if not step_time > 0:
        raise ConfigError(f"step_time must be over 0 seconds, got {step_time}")
    needed = rates.batch_tokens / step_time
    servers = max(1, math.ceil(needed / (BUSY_SHARE * rates.server_tokens)))
    # As many as steps fit the latency, and one a server at least. One more: a server then has the next request while
    # it sends an answer, and a batch may be late.
    depth = max(servers, math.ceil(rates.latency / step_time)) + 1
    return Advice(
        servers=servers,
        depth=depth,
        needed_tokens=needed,
        busy=needed / (servers * rates.server_tokens),
        client_busy=rates.client_seconds / step_time,
        waiting_bytes=depth * rates.batch_bytes,
    )


def rates_of(cells: Sequence[Cell], workload: Workload) -> list[tuple[Cell, Rates]]:
    """What advice is made of, for each combination that has a client that is alone and waits for each batch."""
    measured = [cell for cell in cells if cell.problem is None and cell.rates]
    found = []
    for alone in measured:
        if (alone.clients, alone.depth) != (1, 1):
            continue
        alike = [cell for cell in measured if cell.combination == alone.combination]
        stages = alone.stage_ms()
        rates = Rates(
            batch_tokens=workload.real_tokens,
            server_tokens=max(cell.rate for cell in alike),
            latency=nine_of_ten(alone.batch_seconds),
            client_seconds=(stages["transfer"] + stages["assembly"]) / 1000,
            batch_bytes=alone.bytes_per_token * workload.real_tokens,
        )
        found.append((alone, rates))
    return found


def nine_of_ten(values: Sequence[float]) -> float:
    """What nine of ten values do not exceed."""
    return values[0] if len(values) == 1 else statistics.quantiles(values, n=10, method="inclusive")[-1]


def advice_lines(cell: Cell, rates: Rates, step_time: float) -> list[str]:
    """Advice in words, with what it rests on."""
    advice = advise(rates, step_time)
    plural = "" if advice.servers == 1 else "s"
    lines = [
        f"{cell.endpoint.name}, {cell.transport}, {cell.encoding}: {advice.servers} server{plural}, "
        f"prefetch depth {advice.depth}",
        f"  the trainer takes {rates.batch_tokens:,} tokens every {step_time:g} s: "
        f"{advice.needed_tokens:,.0f} tokens/s",
        f"  a server gives {rates.server_tokens:,.0f} tokens/s, of which 90 % is counted on: "
        f"{advice.servers} server{plural}, busy {advice.busy:.0%} of the time",
        f"  a batch takes {rates.latency:.3f} s from request to batch, {rates.latency / step_time:.2f} steps; "
        f"{advice.depth} on their way take {advice.waiting_bytes / 1e6:,.0f} MB",
    ]
    if advice.client_busy > 1:
        lines.append(
            f"  the client itself needs {rates.client_seconds:.3f} s a batch, more than a step: "
            "more servers do not help, a smaller encoding or a faster transport does"
        )
    return lines


def to_json(
    cells: Sequence[Cell], workload: Workload, *, step_time: float | None, parity: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Everything, as plain data."""
    return {
        "machine": describe_machine(),
        "workload": {**workload.to_json(), "real_tokens": workload.real_tokens},
        "cells": [cell_json(cell) for cell in cells],
        "advice": []
        if step_time is None
        else [
            {"cell": describe(cell), "rates": asdict(rates), "advice": asdict(advise(rates, step_time))}
            for cell, rates in rates_of(cells, workload)
        ],
        "parity": list(parity),
    }


def cell_json(cell: Cell) -> dict[str, Any]:
    """One combination, as plain data."""
    named = {
        "target": cell.endpoint.name,
        "url": cell.endpoint.url,
        "transport": cell.used_transport or cell.transport,
        "encoding": cell.encoding,
        "clients": cell.clients,
        "depth": cell.depth,
        "problem": cell.problem,
    }
    if cell.problem is not None:
        return named
    memory = cell.endpoint.memory
    return {
        **named,
        "tokens_per_second": cell.rate,
        "tokens_per_second_by_round": cell.rates,
        "slowest_over_fastest": cell.slowest_over_fastest,
        "batch_seconds": cell.batch_seconds,
        "bytes_per_token": cell.bytes_per_token,
        "server_peak_mb": cell.server_peak_mb,
        "server_memory_source": None if memory is None else memory.source,
        "client_peak_mb": cell.client_peak_mb,
        "stage_ms": cell.stage_ms(),
    }


def describe_machine() -> str:
    """System, processor and interpreter."""
    load = Path("/proc/loadavg")
    before = f", load {load.read_text(encoding='ascii').split()[0]}" if load.exists() else ""
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}{before}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < SMALL_MS else f"{value:,.0f}"
