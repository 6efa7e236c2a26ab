"""Every fault and bad input that docs/reliability.md lists, tried again and again, and a load: make faults.

    python -m benchmarks.faults --rounds 20 --minutes 2

Real processes on this machine over a target without an engine: trainers and servers are killed, stopped and restarted,
connections cut, answers changed. Every batch is compared, bit for bit, with the target's own. `--write` puts the tables
into docs/reliability.md. The status is 1 where a batch was wrong or lost, or another error came than the one due.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import soak
from benchmarks.fault_sides import failover, transfers
from benchmarks.fault_sides.inputs import try_inputs
from benchmarks.report import describe_machine, print_result, print_table
from eagle_target.client import balancer
from eagle_target.testing.server import loopback_server
from tests.faults.processes import faulty_server

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
# Seconds a server that failed is left alone at first: 1 outside of here.
PAUSE_SECONDS = 0.05
FAULT_COLUMNS = (
    "fault",
    "transport",
    "rounds",
    "batches right",
    "wrong",
    "retries",
    "errors",
    "a user sees",
    "longest s",
)
INPUT_COLUMNS = ("input", "times", "answer", "good requests right after", "longest s")
LOAD_COLUMNS = ("process", "resident MB, start", "end", "most", "threads, start", "end", "descriptors, start", "end")

Table = tuple[str, Sequence[str], list[tuple[str, ...]]]


def try_faults(rounds: int, only: str) -> tuple[Table, list[str]]:
    """The table of faults, and the names of those that went wrong."""
    rows: list[tuple[str, ...]] = []
    bad = []
    for fault in itertools.chain(transfers.faults(), failover.faults()):
        if not re.search(only, fault.name):
            continue
        started = time.monotonic()
        tally, is_well = fault.run(rounds)
        if not is_well:
            bad.append(f"{fault.name} ({fault.transport})")
        errors = ", ".join(f"{count} `{name}`" for name, count in sorted(tally.errors.items())) or "-"
        counts = (str(rounds), str(tally.right), str(tally.wrong), str(tally.retries))
        rows.append((fault.name, fault.transport, *counts, errors, fault.seen, f"{tally.longest:.2f}"))
        print(f"{' '.join(rows[-1])} ({time.monotonic() - started:.1f} s in all)", flush=True)
    return ("Faults", FAULT_COLUMNS, rows), bad


def try_bad_inputs(rounds: int, only: str) -> tuple[Table, list[str]]:
    """The table of bad inputs, and the names of those that were answered otherwise than is due."""
    rows: list[tuple[str, ...]] = []
    bad = []
    for name, due, answers in try_inputs(rounds, only):
        if answers.given != {due: rounds} or answers.right != rounds:
            bad.append(name)
        given = ", ".join(f"{answer}" for answer in answers.given)
        rows.append((name, str(rounds), given, str(answers.right), f"{answers.longest:.2f}"))
    return ("Bad inputs", INPUT_COLUMNS, rows), bad


def hold_load(minutes: float) -> tuple[Table, dict[str, Any]]:
    """The table of the load, and the soak's figures."""
    result = soak.run(minutes, min(soak.SLICE_SECONDS, 30 * minutes))
    rows = []
    for process, by_name in result["figures"].items():
        memory, threads, descriptors = (by_name[name] for name in ("rss_mb", "threads", "descriptors"))
        figures = [memory["start"], memory["end"], memory["max"], threads["start"], threads["end"]]
        figures += [descriptors["start"], descriptors["end"]]
        rows.append((process, *(f"{figure:,.0f}" for figure in figures)))
    return ("Load", LOAD_COLUMNS, rows), result


def describe_load(result: dict[str, Any]) -> str:
    """The load in a sentence."""
    seconds = 60 * result["minutes"]
    return (
        f"{result['clients']} clients on one server for {result['minutes']:.1f} minutes: {result['batches']:,} "
        f"batches, {result['wrong']} wrong, {result['lost']} lost; {result['batches_per_second']:.0f} requests/s, "
        f"{result['tokens'] / seconds:,.0f} tokens/s. Each client compares every batch with its own target's, so most "
        "of the machine's time goes there."
    )


def markdown(table: Table) -> str:
    """A table for a page."""
    _, columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(tables: Sequence[Table], about: str, load: str, *, keep_others: bool) -> None:
    """Put the tables between the page's markers; with `keep_others`, their rows beside those that stand there."""
    page = PAGE.read_text(encoding="utf-8")
    for title, columns, rows in tables:
        name = title.lower().replace(" ", "-")
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, old, after = (
            page[: page.index(begin)],
            page[page.index(begin) : page.index(end)],
            page[page.index(end) :],
        )
        lead, shown = load if title == "Load" else about, rows
        if keep_others and title != "Load":
            lead = next((line for line in old.splitlines()[1:] if line), about)
            shown = merge(old, rows, 2 if title == "Faults" else 1)
        page = f"{before}{begin}\n{lead}\n\n{markdown((title, columns, shown))}\n\n{after}"
    PAGE.write_text(page, encoding="utf-8")


def merge(old: str, rows: list[tuple[str, ...]], cells: int) -> list[tuple[str, ...]]:
    """Rows over those of a page, where the same first cells make the same row."""
    lines = [line.strip("| ").split(" | ") for line in old.splitlines() if line.startswith("| ")]
    return list({row[:cells]: row for row in [*map(tuple, lines[2:]), *rows]}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=20, help="of each fault and input; 0 for none (default %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="of the load; 0 for none (default %(default)s)")
    parser.add_argument(
        "--only", default="", help="faults and inputs whose name has this pattern; the others' rows stay"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reliability.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    machine = describe_machine()
    print(machine, flush=True)
    started = time.monotonic()
    # The process that others are forked from, before this one has threads.
    with faulty_server(), loopback_server():
        pass
    tables: list[Table] = []
    load = ""
    result: dict[str, Any] = {"rounds": arguments.rounds, "bad": []}
    if arguments.rounds:
        with mock.patch.object(balancer, "FIRST_PAUSE_SECONDS", PAUSE_SECONDS):
            for attempt in (try_faults, try_bad_inputs):
                table, bad = attempt(arguments.rounds, arguments.only)
                tables.append(table)
                result["bad"] += bad
    if arguments.minutes:
        table, figures = hold_load(arguments.minutes)
        tables.append(table)
        load = describe_load(figures)
        result |= {"load": figures, "bad": [*result["bad"], *figures["grown"]]}
        result["bad"] += ["wrong or lost batches under load"] * bool(figures["wrong"] or figures["lost"])
    for title, columns, rows in tables:
        print_table(title, columns, rows)
    print(load)
    if arguments.write:
        about = f"{machine}; {arguments.rounds} rounds each."
        write(tables, about, f"{machine}. {load}", keep_others=bool(arguments.only))
    print_result({**result, "seconds": time.monotonic() - started})
    if result["bad"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
