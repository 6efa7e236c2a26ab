"""Prefill under vLLM: what capture and projection cost.

    python benchmarks/vllm_prefill.py      # or: make bench-vllm

A random float32 Llama of 38 layers with a vocabulary of 32 000: its head is 7.5 % of its body, as Llama-3.1-8B's is.
`--layers 14` makes a target whose head is 20 % of it. 1 024 tokens of eight prompts, every second row supervised, a
draft vocabulary of 8 000. Four sides, each a process in vLLM's environment, take turns: (a) plain vLLM as it comes,
compiled, with one generated token a prompt; (b) our vLLM adapter, supervision as a client gets it; (c) the hf adapter,
the same; (d) the reference's way, a file a sample through vLLM's connector and the head rebuilt outside in float32 over
all rows.

vs_prefill, vs_hf, vs_reference: our tokens/s by theirs, each the median over rounds of the ratio within a round. The
mean logsumexp of the supervised rows must be the same on (b), (c) and (d).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from typing import Any

from benchmarks.processes import ROOT, Worker
from benchmarks.report import describe_machine, print_result, print_table, spread

SIDE = "benchmarks.vllm_prefill_side"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SIDES = ("plain", "ours", "hf", "reference")
TOKENS = 1024
LAYERS = 38
TOLERANCE = 1e-3
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "2", "VLLM_LOGGING_LEVEL": "ERROR"}


def check_same(checksums: dict[str, float]) -> None:
    """Whether the sides computed the same.

    Raises:
        SystemExit: they did not.
    """
    wrong = {side: value for side, value in checksums.items() if abs(value - checksums["hf"]) > TOLERANCE}
    if wrong:
        raise SystemExit(f"the sides do not compute the same, the figures would mean nothing: {checksums}")


def run(rounds: int, layers: int) -> dict[str, Any]:
    """Run all sides in turns and return the figures."""
    print(describe_machine())
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    checksums: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="eagle-target-bench-") as folder, ExitStack() as running:
        with Worker(SIDE, "save", folder, str(layers), python=PYTHON) as saving:
            saving.ask("memory")
        workers = {}
        for side in SIDES:
            workers[side] = running.enter_context(
                Worker(SIDE, side, folder, str(layers), python=PYTHON, environment=ENVIRONMENT)
            )
            checksums[side] = workers[side].ask("run")["checksum"]
        check_same({side: value for side, value in checksums.items() if side != "plain"})
        for index in range(rounds):
            for side in SIDES if index % 2 == 0 else reversed(SIDES):
                seconds[side].append(workers[side].ask("run")["seconds"])
    return {**summarise(seconds), "layers": layers}


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The figures of all rounds."""
    ratios = {
        side: statistics.median(theirs / mine for theirs, mine in zip(seconds[side], seconds["ours"], strict=True))
        for side in SIDES
    }
    print_table(
        f"{TOKENS} tokens under vLLM",
        ("side", "seconds", "tokens/s", "ours / theirs"),
        [
            (side, spread(seconds[side]), f"{TOKENS / statistics.median(seconds[side]):,.0f}", f"{ratios[side]:.2f}")
            for side in SIDES
        ],
    )
    return {
        "vs_prefill": ratios["plain"],
        "vs_hf": ratios["hf"],
        "vs_reference": ratios["reference"],
        "tokens_per_second": {side: TOKENS / statistics.median(seconds[side]) for side in SIDES},
        "rounds": len(seconds["ours"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that every side runs (default %(default)s)")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the target (default %(default)s)")
    arguments = parser.parse_args()
    print_result(run(arguments.rounds, arguments.layers))


if __name__ == "__main__":
    main()
