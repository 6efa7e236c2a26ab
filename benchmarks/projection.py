"""Projection onto the draft vocabulary: memory and time against the reference's.

    python benchmarks/projection.py      # or: make bench-projection

Llama-3's vocabulary of 128 256, a draft vocabulary of 32 000 in an order of its own, 1k to 8k tokens, all in float32.
Both sides start from the same last hidden states `[tokens, 512]` (512 so that 8k tokens run in seconds on two cores;
the hidden size changes neither side's memory) and the same head weight, and end with target_probs and position_mask.
The reference makes all logits with the head, shifts them left as its `generate_batch` does, and calls its own
`_compute_target_distribution`. Ours is `project_full` into packed outputs, which adds the logsumexp of each row.

Each measurement is a fresh process, so that its peak is its own. extra memory = peak resident - resident before -
bytes of the outputs. time_vs_reference is the geometric mean over the sizes of (our median seconds / theirs), below 1
where ours is faster; cpu_time_vs_reference is the same of processor seconds. The two sides take turns. The
probabilities of both are compared, row by row, on a sample of columns: the largest difference is printed.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from typing import Any

from benchmarks.processes import Worker
from benchmarks.reference import VERSION, reference_python
from benchmarks.report import describe_machine, print_result, print_table, spread

SIDE = "benchmarks.projection_side"
SIZES = (1024, 2048, 4096, 8192)
TOLERANCE = 1e-5
# A tie within rounding may fall either way: matrix products of other sizes round otherwise.
TIES_TOLERANCE = 1e-3


def measure(side: str, tokens: int) -> dict[str, Any]:
    """One run in a fresh process."""
    python = reference_python() if side == "reference" else None
    with Worker(SIDE, side, str(tokens), python=python) as worker:
        return worker.ask("run")


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Of the sampled probabilities.

    Raises:
        SystemExit: the two sides do not compute the same.
    """
    pairs = zip(ours["probs"], theirs["probs"], strict=True)
    difference: float = max(abs(mine - other) for mine, other in pairs)
    ties = abs(ours["supervised"] - theirs["supervised"])
    if difference > TOLERANCE or ties > TIES_TOLERANCE * ours["supervised"]:
        raise SystemExit(
            f"the two sides differ by {difference:g}, and supervise {ours['supervised']} and {theirs['supervised']} "
            "positions: the figures would mean nothing"
        )
    return difference


def run(repeats: int) -> dict[str, Any]:
    """Measure every size on both sides and return the figures."""
    reference_python()
    print(describe_machine())
    runs: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for repeat in range(repeats):
        for tokens in SIZES:
            for side in ("ours", "reference") if repeat % 2 == 0 else ("reference", "ours"):
                runs[side, tokens].append(measure(side, tokens))
    difference = max(largest_difference(runs["ours", n][0], runs["reference", n][0]) for n in SIZES)
    extra = {key: max(figures["extra_mb"] for figures in runs[key]) for key in runs}
    seconds = {key: [figures["seconds"] for figures in runs[key]] for key in runs}
    cpu = {key: [figures["cpu_seconds"] for figures in runs[key]] for key in runs}
    ratios, cpu_ratios = (
        {n: statistics.median(times["ours", n]) / statistics.median(times["reference", n]) for n in SIZES}
        for times in (seconds, cpu)
    )
    print_table(
        f"Projection, vocabulary 128 256 to 32 000, float32; reference {VERSION}",
        ("tokens", "extra MB", "reference", "seconds", "reference", "time / reference", "CPU / reference"),
        [
            (
                f"{n}",
                f"{extra['ours', n]:,.0f}",
                f"{extra['reference', n]:,.0f}",
                spread(seconds["ours", n]),
                spread(seconds["reference", n]),
                f"{ratios[n]:.2f}",
                f"{cpu_ratios[n]:.2f}",
            )
            for n in SIZES
        ],
    )
    print(f"largest difference of a probability: {difference:.1e}")
    return {
        "extra_mb": {n: extra["ours", n] for n in SIZES},
        "reference_extra_mb": {n: extra["reference", n] for n in SIZES},
        "extra_growth": extra["ours", SIZES[-1]] / extra["ours", SIZES[0]],
        "reference_extra_growth": extra["reference", SIZES[-1]] / extra["reference", SIZES[0]],
        "time_vs_reference": statistics.geometric_mean(ratios.values()),
        "cpu_time_vs_reference": statistics.geometric_mean(cpu_ratios.values()),
        "time_vs_reference_by_tokens": ratios,
        "seconds": {n: statistics.median(seconds["ours", n]) for n in SIZES},
        "reference_seconds": {n: statistics.median(seconds["reference", n]) for n in SIZES},
        "max_difference": difference,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each size and side (default %(default)s)")
    print_result(run(parser.parse_args().repeats))


if __name__ == "__main__":
    main()
