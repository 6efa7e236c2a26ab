"""Where vLLM's engine runs: in the server's process or in its own, with one worker or two.

    python -m benchmarks.vllm_layouts      # or: make bench-vllm-layouts

The supervision of 8 prompts of 256 tokens on a random float32 Llama of 8 layers, hidden size 768, 32 000 tokens of
vocabulary, not compiled. One layout after another, for engines that wait keep cores busy; medians over rounds. Every
second round takes fresh memory where the answer comes from another process: `fresh / reused` is what using blocks again
saves. All layouts must give the same mean logsumexp.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

from benchmarks.processes import Worker
from benchmarks.report import describe_machine, print_result, print_table, spread
from benchmarks.vllm_prefill import ENVIRONMENT, PYTHON, TOLERANCE
from benchmarks.vllm_prefill import SIDE as TARGET_SIDE

SIDE = "benchmarks.vllm_layouts_side"
LAYOUTS = [("inline", 1), ("separate", 1), ("inline", 2), ("separate", 2)]
LAYERS = 8
CORES = 2


def measure(folder: str, process: str, workers: int, rounds: int) -> dict[str, Any]:
    """The seconds of one layout."""
    seconds: dict[str, list[float]] = {"run": [], "run_fresh": []}
    # The adapter sets what the layout needs; threads are the cores' share of a worker.
    environment = {"VLLM_LOGGING_LEVEL": ENVIRONMENT["VLLM_LOGGING_LEVEL"], "OMP_NUM_THREADS": str(CORES // workers)}
    with Worker(SIDE, folder, process, str(workers), python=PYTHON, environment=environment) as worker:
        for _ in range(2):
            first = worker.ask("run")
        for _ in range(rounds):
            for command, measured in seconds.items():
                measured.append(worker.ask(command)["seconds"])
    return {**seconds, "load": first["load_seconds"], "checksum": first["checksum"]}


def run(rounds: int) -> dict[str, Any]:
    """Measure every layout and return the figures.

    Raises:
        SystemExit: the layouts do not compute the same.
    """
    print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="eagle-target-bench-") as folder:
        with Worker(TARGET_SIDE, "save", folder, str(LAYERS), python=PYTHON) as saving:
            saving.ask("memory")
        measured = {f"{process}-{workers}": measure(folder, process, workers, rounds) for process, workers in LAYOUTS}
    checksums = {name: figures["checksum"] for name, figures in measured.items()}
    if max(checksums.values()) - min(checksums.values()) > TOLERANCE:
        raise SystemExit(f"the layouts do not compute the same, the figures would mean nothing: {checksums}")
    print_table(
        "process layouts of vLLM",
        ("layout", "load s", "forward s", "with fresh memory s", "fresh / reused"),
        [
            (
                name,
                f"{figures['load']:.0f}",
                spread(figures["run"]),
                spread(figures["run_fresh"]),
                f"{_gain(figures):.2f}",
            )
            for name, figures in measured.items()
        ],
    )
    return {
        "seconds": {name: statistics.median(figures["run"]) for name, figures in measured.items()},
        "load_seconds": {name: figures["load"] for name, figures in measured.items()},
        "fresh_by_reused": {name: _gain(figures) for name, figures in measured.items()},
        "rounds": rounds,
    }


def _gain(figures: dict[str, Any]) -> float:
    ratios: list[float] = [fresh / reused for fresh, reused in zip(figures["run_fresh"], figures["run"], strict=True)]
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that every layout runs (default %(default)s)")
    print_result(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
