"""Tokens a second of the sglang adapter, against SGLang's own prefill, the HF adapter and the reference's way.

    python -m benchmarks.sglang_extend      # or: make bench-sglang

A random Llama that this script makes (8 layers, hidden 512, vocabulary 32 000, float32), batches of 8 x 256 tokens, a
draft vocabulary of 8 000. On the CPU, a thread each; every contender takes its turn in every round, and the figures are
the medians of the rounds. Environment of the engine: SGLANG_PYTHON, by default .venv-sglang.

extend       SGLang's own bench helpers: no capture, logits of one row a sequence, sampled
capture      our adapter's forward: aux and last hidden states of every row, no logits
supervision  the same with every row projected onto the draft vocabulary, a tile at a time
hf           supervision by the HF adapter
reference    the same engine and hidden states, then logits of every row as NeMo AutoModel makes them

vs_extend = capture / extend: what taking the hidden states costs the engine. supervision_vs_extend has the head, too,
which extend does not run for every row. vs_hf and vs_reference compare supervision with theirs. extra memory = peak
resident - resident before - outputs; extra_growth = ours at 8 x 512 tokens / at 2 x 512.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, Worker
from benchmarks.report import describe_machine, print_result, print_table, spread

SIDE = "benchmarks.sglang_side"
MODEL = ROOT / ".bench" / "llama-v32k"
VOCAB = 32_000
DRAFT_VOCAB = 8_000
BATCH = {"rows": 8, "width": 256}
CONTENDERS = ("extend", "capture", "supervision", "hf", "reference")
TOLERANCE = 1e-2
ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}


def make_model() -> Path:
    """The checkpoint, made once."""
    if not (MODEL / "config.json").exists():
        from eagle_target.testing.tiny import save_tiny_target

        save_tiny_target(MODEL, vocab=VOCAB, hidden=512, heads=8, kv_heads=4, layers=8)
    return MODEL


def run(rounds: int) -> dict[str, Any]:
    """Measure and return the figures."""
    print(describe_machine())
    model = str(make_model())
    python = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with (
        Worker(SIDE, "sglang", model, str(DRAFT_VOCAB), "1", python=python, environment=ENVIRONMENT) as sglang,
        Worker(SIDE, "hf", model, str(DRAFT_VOCAB), "1", environment=ENVIRONMENT) as hf,
    ):
        workers = {name: hf if name == "hf" else sglang for name in CONTENDERS}
        for number in range(rounds + 1):
            turn = number % len(CONTENDERS)
            for name in CONTENDERS[turn:] + CONTENDERS[:turn]:
                work = "supervision" if name == "hf" else name
                figures = workers[name].ask("run", work=work, **BATCH)
                if number:  # the first round warms up
                    runs[name].append(figures)
        extra = {
            name: {rows: workers[name].ask("run", work=name, rows=rows, width=512)["extra_mb"] for rows in (2, 8)}
            for name in ("supervision", "reference")
        }
    check_agreement(runs)
    return report(runs, extra, rounds)


def check_agreement(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse figures of contenders that do not compute the same.

    Raises:
        SystemExit: sums over a part of the aux hidden states differ.
    """
    probes = {name: runs[name][0]["probe"][0] for name in ("supervision", "hf", "reference")}
    if max(probes.values()) - min(probes.values()) > TOLERANCE * max(1.0, *(abs(value) for value in probes.values())):
        raise SystemExit(f"the contenders compute different hidden states: {probes}; the figures would mean nothing")


def report(runs: dict[str, list[dict[str, Any]]], extra: dict[str, dict[int, float]], rounds: int) -> dict[str, Any]:
    """Print the table and return what ends the run."""
    tokens = BATCH["rows"] * BATCH["width"]
    speeds = {name: [tokens / figures["seconds"] for figures in runs[name]] for name in CONTENDERS}
    median = {name: statistics.median(speeds[name]) for name in CONTENDERS}
    print_table(
        f"{BATCH['rows']} x {BATCH['width']} tokens, vocabulary {VOCAB}, float32, one thread",
        ("", "tokens/s", "of extend"),
        [(name, spread(speeds[name], ",.0f"), f"{median[name] / median['extend']:.2f}") for name in CONTENDERS],
    )
    return {
        "vs_extend": median["capture"] / median["extend"],
        "vs_hf": median["supervision"] / median["hf"],
        "vs_reference": median["supervision"] / median["reference"],
        "extra_growth": extra["supervision"][8] / extra["supervision"][2],
        "reference_extra_growth": extra["reference"][8] / extra["reference"][2],
        "supervision_vs_extend": median["supervision"] / median["extend"],
        "tokens_per_second": median,
        "extra_mb": extra,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default %(default)s)")
    print_result(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
