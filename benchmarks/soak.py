"""Four clients at one server for a long time: does anything grow, get lost or come out wrong?

    python -m benchmarks.soak --minutes 30          # or: make soak

A real server process on a target without an engine, and four client processes: two transports, two encodings, batches
of mixed lengths, padded left and right, and packed. Each client compares every batch, bit for bit, with what the same
target gives in its own process, in the order it asked for them. Memory, threads and descriptors of all five are looked
at after each slice of time; `start` is after the first slice, which warms up.

The status is 1 where a batch is wrong or lost, threads or descriptors grew, or memory grew by more than GROWTH_MB.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.processes import MB, Worker
from benchmarks.report import describe_machine, print_result, print_table
from benchmarks.server_sides.soaker import HIDDEN, VOCAB
from eagle_target.bench.processes import read_status
from eagle_target.testing.server import embedding_process

SOAKER = "benchmarks.server_sides.soaker"
CLIENTS = (("wire", "probs"), ("wire", "hidden"), ("auto", "probs"), ("auto", "hidden"))
GROWTH_MB = 64.0
# A request under way at the moment of a look may hold a few.
GROWTH_COUNT = 8
SLICE_SECONDS = 15.0

Sample = dict[str, float]


def look(process: int) -> Sample:
    """Resident MB, threads and descriptors of a process."""
    return {
        "rss_mb": (read_status(process, "VmRSS") or 0) / MB,
        "threads": sum(1 for _ in Path(f"/proc/{process}/task").iterdir()),
        "descriptors": sum(1 for _ in Path(f"/proc/{process}/fd").iterdir()),
    }


def summarize(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Start, end and most of each figure."""
    return {
        name: {
            "start": samples[0][name],
            "end": samples[-1][name],
            "max": max(sample[name] for sample in samples),
        }
        for name in samples[0]
    }


def grown(figures: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """What grew by more than it may."""
    limits = {"rss_mb": GROWTH_MB, "threads": GROWTH_COUNT, "descriptors": GROWTH_COUNT}
    return [
        f"{process} {name}"
        for process, by_name in figures.items()
        for name, values in by_name.items()
        if values["end"] - values["start"] > limits[name]
    ]


def run(minutes: float, slice_seconds: float) -> dict[str, Any]:
    """Soak and return the figures."""
    print(describe_machine(), flush=True)
    totals = {"batches": 0, "wrong": 0, "lost": 0, "tokens": 0}
    with ExitStack() as running:
        server = running.enter_context(embedding_process({"vocab_size": VOCAB, "hidden_size": HIDDEN}))
        clients = [
            running.enter_context(Worker(SOAKER, server.url, transport, encoding, str(number)))
            for number, (transport, encoding) in enumerate(CLIENTS)
        ]
        processes = {"server": server.process.pid}
        processes |= {f"client {number + 1}": client.process_id for number, client in enumerate(clients)}
        samples: dict[str, list[Sample]] = {name: [] for name in processes}
        threads = running.enter_context(ThreadPoolExecutor(len(clients)))
        for client in clients:
            client.ask("memory")  # it answers when it is connected
        started = time.monotonic()
        while not samples["server"] or time.monotonic() - started < 60 * minutes:
            for answer in threads.map(lambda client: client.ask("work", seconds=slice_seconds), clients):
                for name in totals:
                    totals[name] += answer[name]
            for name, process in processes.items():
                samples[name].append(look(process))
        taken = time.monotonic() - started
    figures = {name: summarize(taken_samples) for name, taken_samples in samples.items()}
    show(figures)
    return {
        **totals,
        "minutes": taken / 60,
        "batches_per_second": totals["batches"] / taken,
        "clients": len(CLIENTS),
        "looks": len(samples["server"]),
        "grown": grown(figures),
        "figures": figures,
    }


def show(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print start, end and most of each process."""
    names = list(next(iter(figures.values())))
    lines = [
        (process, *(f"{by_name[name][moment]:,.0f}" for name in names for moment in ("start", "end", "max")))
        for process, by_name in figures.items()
    ]
    columns = [f"{name} {moment}" for name in names for moment in ("start", "end", "max")]
    print_table("After the first slice, after the last one, at most", ("", *columns), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default %(default)s)")
    parser.add_argument(
        "--slice", type=float, default=SLICE_SECONDS, help="seconds from look to look (default %(default)s)"
    )
    arguments = parser.parse_args()
    result = run(arguments.minutes, arguments.slice)
    print_result(result)
    if result["wrong"] or result["lost"] or result["grown"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
