"""Tokens a second of the sglang adapter, against SGLang's own prefill, the HF adapter and the reference's way.

    python -m benchmarks.sglang_extend      # or: make bench-sglang

Two random Llamas that this script makes, vocabulary 32 000, float32. *real* has the proportions of Llama-3.1-8B, whose
head weighs 7.5 % of its layers: 40 layers, hidden 768, grouped queries, a head of 7.9 %. *head-heavy* has 8 layers,
hidden 512 and a head of 58 %. Batches of 768 tokens, a draft vocabulary of 8 000. On the CPU, two threads; all
contenders take turns in every round. Every ratio is the median over the rounds of the ratio within a round. Environment
of the engine: SGLANG_PYTHON, by default .venv-sglang.

extend       SGLang's own bench helpers: no capture, logits of one row a sequence, sampled
capture      our adapter's forward: aux and last hidden states of every row, no logits
supervision  as a client gets it: capture, and every second row projected (in chat data under half bear loss)
all_rows     the same with every row projected
hf           supervision, every second row, by the HF adapter
reference    the same engine and hidden states, then logits of every row as NeMo AutoModel makes them

vs_extend, vs_hf, vs_reference: supervision over theirs, on *real*. vs_extend_all_rows and vs_reference_all_rows have
every row projected; head_heavy has the ratios to extend on the other model. by_products: what the ratios to extend
would be if only the products with weights took time. vs_hf_ragged is on sequences of different lengths. extra memory =
peak resident - resident before - outputs, all rows, on *head-heavy*, after a run of the largest batch, so that the KV
pool is resident, and with a C heap that keeps nothing it was given back. extra_growth = ours at 8 x 512 tokens / at
2 x 512.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, Worker
from benchmarks.report import describe_machine, print_result, print_table, spread

SIDE = "benchmarks.sglang_side"
VOCAB = 32_000
DRAFT_VOCAB = 8_000
KV_HEADS = 4
THREADS = "2"
EQUAL = [192] * 4
RAGGED = [28, 308, 76, 189, 167]
MEMORY_SIZES = {1024: [512] * 2, 4096: [512] * 8}
MEMORY_ROUNDS = 3
TOLERANCE = 1e-2
ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": THREADS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A checkpoint to make, and the layers to capture."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    aux_layer_ids: tuple[int, int, int]

    @property
    def path(self) -> Path:
        """Where it lies."""
        return ROOT / ".bench" / f"llama-{self.name}-v32k"

    def make(self) -> None:
        """Write it, once."""
        if (self.path / "config.json").exists():
            return
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=KV_HEADS,
            initializer_range=0.06,
            bos_token_id=0,
            eos_token_id=1,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(self.path)

    @property
    def head_weight(self) -> float:
        """Weights of the head over those of the layers: what projecting every row adds to the products of a prefill."""
        attention: float = 2 * self.hidden * self.hidden * (1 + KV_HEADS / self.heads)
        return VOCAB * self.hidden / (self.layers * (attention + 3 * self.hidden * self.intermediate))

    def arguments(self) -> tuple[str, ...]:
        """What `benchmarks.sglang_side` takes after its kind."""
        return (str(self.path), str(DRAFT_VOCAB), THREADS, *map(str, self.aux_layer_ids))


REAL = Model(name="real", hidden=768, intermediate=2688, layers=40, heads=12, aux_layer_ids=(1, 19, 36))
HEAD_HEAVY = Model(name="head-heavy", hidden=512, intermediate=1792, layers=8, heads=8, aux_layer_ids=(1, 3, 4))

# Contender: worker, what it runs, on which lengths.
CONTENDERS: dict[str, tuple[str, str, list[int]]] = {
    "extend": ("real", "extend", EQUAL),
    "supervision": ("real", "supervision", EQUAL),
    "all_rows": ("real", "all_rows", EQUAL),
    "hf": ("hf", "supervision", EQUAL),
    "reference": ("real", "reference", EQUAL),
    "supervision, ragged": ("real", "supervision", RAGGED),
    "hf, ragged": ("hf", "supervision", RAGGED),
    "head-heavy extend": ("head-heavy", "extend", EQUAL),
    "head-heavy capture": ("head-heavy", "capture", EQUAL),
    "head-heavy supervision": ("head-heavy", "supervision", EQUAL),
    "head-heavy all_rows": ("head-heavy", "all_rows", EQUAL),
}
COMPARED = (("supervision", "all_rows", "hf", "reference"), ("supervision, ragged", "hf, ragged"))

Runs = dict[str, list[dict[str, Any]]]


def run(rounds: int) -> dict[str, Any]:
    """Measure and return the figures."""
    print(describe_machine())
    for model in (REAL, HEAD_HEAVY):
        model.make()
    python = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
    runs: Runs = defaultdict(list)
    with (
        Worker(SIDE, "sglang", *REAL.arguments(), python=python, environment=ENVIRONMENT) as real,
        Worker(SIDE, "sglang", *HEAD_HEAVY.arguments(), python=python, environment=ENVIRONMENT) as head_heavy,
        Worker(SIDE, "hf", *REAL.arguments(), environment=ENVIRONMENT) as hf,
    ):
        workers = {"real": real, "head-heavy": head_heavy, "hf": hf}
        names = list(CONTENDERS)
        for number in range(rounds + 1):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                worker, work, lengths = CONTENDERS[name]
                figures = workers[worker].ask("run", work=work, lengths=lengths)
                if number:  # the first round warms up
                    runs[name].append(figures)
        extra = measure_memory(head_heavy)
    check_agreement(runs)
    return report(runs, extra, rounds)


def measure_memory(worker: Worker) -> dict[str, dict[int, float]]:
    """Extra MB by contender and tokens, the median of a few runs."""
    extra: dict[str, dict[int, float]] = {}
    worker.ask("measure_memory_in_use")
    for work in ("all_rows", "reference"):
        worker.ask("run", work=work, lengths=MEMORY_SIZES[4096])
        seen = defaultdict(list)
        for _ in range(MEMORY_ROUNDS):
            for tokens, lengths in MEMORY_SIZES.items():
                seen[tokens].append(worker.ask("run", work=work, lengths=lengths)["extra_mb"])
        extra[work] = {tokens: statistics.median(values) for tokens, values in seen.items()}
    return extra


def check_agreement(runs: Runs) -> None:
    """Refuse figures of contenders that do not compute the same.

    Raises:
        SystemExit: sums over a part of the hidden states or of the probabilities differ.
    """
    for names in COMPARED:
        probes = {name: runs[name][0]["probe"] for name in names}
        for what in ("aux", "probs"):
            values = [probe[what] for probe in probes.values()]
            if max(values) - min(values) > TOLERANCE * max(map(abs, values)):
                raise SystemExit(f"the contenders compute different things, the figures would mean nothing: {probes}")


def report(runs: Runs, extra: dict[str, dict[int, float]], rounds: int) -> dict[str, Any]:
    """Print the table and return what ends the run."""
    speeds = {name: [sum(CONTENDERS[name][2]) / figures["seconds"] for figures in runs[name]] for name in CONTENDERS}
    own_extend = {name: "head-heavy extend" if name.startswith("head-heavy") else "extend" for name in CONTENDERS}

    def ratio(name: str, other: str) -> float:
        ratios: list[float] = [mine / theirs for mine, theirs in zip(speeds[name], speeds[other], strict=True)]
        return statistics.median(ratios)

    print_table(
        f"{sum(EQUAL)} tokens, vocabulary {VOCAB}, float32, {THREADS} threads, {rounds} rounds",
        ("", "tokens/s", "of extend"),
        [(name, spread(speeds[name], ",.0f"), f"{ratio(name, own_extend[name]):.2f}") for name in CONTENDERS],
    )
    return {
        "vs_extend": ratio("supervision", "extend"),
        "vs_hf": ratio("supervision", "hf"),
        "vs_reference": ratio("supervision", "reference"),
        "extra_growth": extra["all_rows"][4096] / extra["all_rows"][1024],
        "vs_extend_all_rows": ratio("all_rows", "extend"),
        "vs_reference_all_rows": ratio("all_rows", "reference"),
        "vs_hf_ragged": ratio("supervision, ragged", "hf, ragged"),
        "head_heavy": {
            work: ratio(f"head-heavy {work}", "head-heavy extend") for work in ("capture", "supervision", "all_rows")
        },
        "by_products": {
            model.name: {"supervision": 1 / (1 + model.head_weight / 2), "all_rows": 1 / (1 + model.head_weight)}
            for model in (REAL, HEAD_HEAVY)
        },
        "reference_extra_growth": extra["reference"][4096] / extra["reference"][1024],
        "extra_mb": extra,
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default %(default)s)")
    print_result(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
