"""A server against its engine in the trainer's process, against the reference's, and against itself with more clients.

    python -m benchmarks.server          # or: make bench-server

Two random Llamas in float32, both with a vocabulary of 32 000 that is also the draft's, served by the HF adapter:

transfer   hidden 256, 8 layers, 4 x 512 tokens: a batch weighs much and takes little to make
compute    hidden 768, 12 layers, 4 x 256 tokens: the forward is most of it

Threads that wait do not spin (`OMP_WAIT_POLICY=passive`), on any side: a server and a trainer share the cores here.
Every token bears loss. A contender's clients are processes of their own with two batches on their way, and the time
runs from batch to batch. Four clients divide the cores among them, and are given four times as long, so that each has
as many batches. Contenders take turns, round after round, in an order that moves on; figures are medians of the rounds,
ratios are of medians. The reference is `nemo-automodel` from PyPI with its own server, client and HF target, on the
same checkpoint and tokens.

For `vs_colocated` a trainer's step is matrix work of half a batch's time, as the co-located target takes by itself, on
the cores that the target uses as well. The co-located target gives `probs`, its cheapest, and so does the remote one:
with `hidden`, which is shown as well, a trainer of one's own device would project there, and this one does on the cores
of everybody else. The same holds for `four_clients_vs_one`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.processes import ROOT, Worker
from benchmarks.reference import VERSION, reference_python
from benchmarks.report import describe_machine, print_result, print_table, spread
from benchmarks.server_bounds import measure_outbox, measure_projection
from eagle_target.bench.launching import run_server, serve_command
from eagle_target.bench.measuring import Cell, Endpoint, Measurement
from eagle_target.bench.server_memory import ProcessMemory
from eagle_target.bench.sizes import bytes_per_token
from eagle_target.client.timings import STAGES
from eagle_target.contract.target import TargetInfo
from eagle_target.verify.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eagle_target.contract.request import Encoding

CLIENT = "eagle_target.bench.client"
REFERENCE_SIDE = "benchmarks.server_sides.reference"
TRAINER = "benchmarks.server_sides.trainer"
VOCAB = 32_000
STEP_SHARE = 0.5
DEPTH = 2
CLIENTS = 4
MODELS: dict[str, dict[str, int]] = {
    "transfer": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4},
    "compute": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
WORKLOADS = {
    "transfer": Workload(batch=4, seq=512, loss_ratio=1.0),
    "compute": Workload(batch=4, seq=256, loss_ratio=1.0),
}


def save_model(name: str) -> Path:
    """The checkpoint's folder, written where it is not there yet."""
    folder = ROOT / ".bench" / f"server-{name}"
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=2048, **MODELS[name])
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Side:
    """This project's servers and the reference's, of both models, and the processes of their clients."""

    def __init__(self, running: ExitStack, models: dict[str, Path]) -> None:
        python = reference_python()
        self.ours: dict[str, Endpoint] = {}
        self.references: dict[str, Endpoint] = {}
        for name, folder in models.items():
            server = running.enter_context(run_server(serve_command(sys.executable, "hf", str(folder))))
            self.ours[name] = Endpoint(f"ours, {name}", server.url, ProcessMemory(server.process.pid))
            theirs = running.enter_context(Worker(REFERENCE_SIDE, "server", str(folder), python=python))
            url = f"http://127.0.0.1:{theirs.ask('port')['port']}"
            self.references[name] = Endpoint(f"reference, {name}", url, ProcessMemory(theirs.process_id))
        self.clients = [running.enter_context(Worker(CLIENT)) for _ in range(CLIENTS)]
        self.reference_client = running.enter_context(Worker(REFERENCE_SIDE, "client", python=python))

    def cell(self, name: str, *, encoding: str = "hidden", clients: int = 1) -> Cell:
        """One of ours."""
        return Cell(self.ours[name], "wire", encoding, clients, DEPTH)

    def reference_cell(self, name: str) -> Cell:
        """One of the reference's."""
        return Cell(self.references[name], "wire", "probs", 1, DEPTH)


class Rounds:
    """Contenders of one workload, measured in turn."""

    def __init__(self, side: Side, workload: Workload, cells: dict[str, Cell]) -> None:
        self.cells = cells
        self._ours = Measurement(side.clients, workload)
        self._reference = Measurement([side.reference_client], workload)

    def run(self, number: int, seconds: float) -> None:
        """One round of each."""
        cells = list(self.cells.values())
        turn = number % len(cells)
        for cell in cells[turn:] + cells[:turn]:
            measurement = self._reference if cell.endpoint.name.startswith("reference") else self._ours
            measurement.measure(cell, seconds * cell.clients)
            if cell.problem is not None:
                raise SystemExit(f"{cell.endpoint.name}: {cell.problem}")

    def ratio(self, one: str, other: str) -> float:
        """Of two contenders' rates."""
        return self.cells[one].rate / self.cells[other].rate


class Trainers:
    """A trainer with the target in its process and trainers of a server, their steps alike."""

    def __init__(self, running: ExitStack, side: Side, name: str, folder: Path, encodings: Sequence[str]) -> None:
        workload = json.dumps(WORKLOADS[name].to_json())
        self._workers = {
            "colocated": running.enter_context(Worker(TRAINER, str(folder), "probs", workload)),
            **{
                encoding: running.enter_context(Worker(TRAINER, side.ours[name].url, encoding, workload))
                for encoding in encodings
            },
        }
        self._repeats = int(self._workers["colocated"].ask("calibrate", share=STEP_SHARE)["repeats"])
        self.rates: dict[str, list[float]] = {contender: [] for contender in self._workers}

    def run(self, number: int, seconds: float) -> None:
        """One round of each."""
        contenders = list(self._workers)
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            answer = self._workers[contender].ask("run", seconds=seconds, depth=DEPTH, repeats=self._repeats)
            self.rates[contender].append(answer["tokens"] * len(answer["seconds"]) / sum(answer["seconds"]))

    def ratio(self, contender: str) -> float:
        """To the co-located one."""
        return statistics.median(self.rates[contender]) / statistics.median(self.rates["colocated"])


def measured_bytes(rounds: Rounds) -> dict[str, dict[str, float]]:
    """Bytes a token on the wire and by the formula; the last position of a row predicts nothing."""
    workload = WORKLOADS["transfer"]
    info = TargetInfo(
        model="transfer",
        num_layers=MODELS["transfer"]["num_hidden_layers"],
        hidden_size=MODELS["transfer"]["hidden_size"],
        vocab_size=VOCAB,
        dtype="float32",
        device="cpu",
        engine="hf",
        engine_version="",
    )
    share = workload.supervised_tokens / workload.real_tokens
    ours: dict[str, dict[str, float]] = {}
    encodings: tuple[Encoding, ...] = ("hidden", "probs")
    for encoding in encodings:
        formula = bytes_per_token(info, encoding, draft_vocab_size=VOCAB, loss_ratio=share)
        ours[encoding] = {"measured": rounds.cells[encoding].bytes_per_token, "formula": formula}
    return {**ours, "reference": {"measured": rounds.cells["reference"].bytes_per_token}}


def show(title: str, rounds: Rounds) -> None:
    """Print a table of contenders."""
    lines = [
        (
            name,
            str(cell.clients),
            spread(cell.rates, ",.0f"),
            f"{cell.bytes_per_token:,.0f}",
            "" if cell.server_peak_mb is None else f"{cell.server_peak_mb:,.0f}",
            "" if cell.client_peak_mb is None else f"{cell.client_peak_mb:,.0f}",
            *(f"{cell.stage_ms().get(stage, 0.0):,.0f}" if cell.stages else "" for stage in STAGES),
        )
        for name, cell in rounds.cells.items()
    ]
    columns = ("", "clients", "real tokens/s", "bytes/token", "server MB", "client MB")
    print_table(title, (*columns, *(f"{stage} ms" for stage in STAGES)), lines)


def run(rounds: int, seconds: float) -> dict[str, Any]:
    """Measure everything and return the figures."""
    models = {name: save_model(name) for name in MODELS}
    print(describe_machine(), flush=True)
    with ExitStack() as running:
        side = Side(running, models)
        light, heavy = WORKLOADS["transfer"], WORKLOADS["compute"]
        transfer = Rounds(
            side,
            light,
            {
                "hidden": side.cell("transfer"),
                "probs": side.cell("transfer", encoding="probs"),
                "reference": side.reference_cell("transfer"),
                "four clients, hidden": side.cell("transfer", clients=CLIENTS),
                "four clients, probs": side.cell("transfer", encoding="probs", clients=CLIENTS),
            },
        )
        compute = Rounds(side, heavy, {"hidden": side.cell("compute"), "reference": side.reference_cell("compute")})
        padded = Rounds(
            side,
            replace(heavy, pad_ratio=0.5),
            {"hidden": side.cell("compute"), "reference": side.reference_cell("compute")},
        )
        trainers = {
            "transfer": Trainers(running, side, "transfer", models["transfer"], ("hidden", "probs")),
            "compute": Trainers(running, side, "compute", models["compute"], ("hidden", "probs")),
        }
        parts: list[Rounds | Trainers] = [transfer, compute, padded, *trainers.values()]
        for number in range(rounds):
            for part in parts:
                part.run(number, seconds)
    show("Transfer weighs: hidden 256, V = V_draft = 32 000, 4 x 512", transfer)
    show("The forward weighs: hidden 768, 4 x 256", compute)
    show("The forward weighs, half of the tokens are pads", padded)
    for name, trainer in trainers.items():
        lines = [
            (contender, spread(rates, ",.0f"), f"{trainer.ratio(contender):.2f}")
            for contender, rates in trainer.rates.items()
        ]
        print_table(f"With a trainer's step, {name}", ("", "tokens/s", "of co-located"), lines)
    bounds = measure_outbox(sys.executable, models["transfer"])
    slowest = min(transfer.cells[f"four clients, {encoding}"].slowest_over_fastest for encoding in ("hidden", "probs"))
    return {
        "vs_colocated": trainers["compute"].ratio("probs"),
        "vs_colocated_hidden": trainers["compute"].ratio("hidden"),
        "vs_colocated_transfer": trainers["transfer"].ratio("probs"),
        "vs_colocated_transfer_hidden": trainers["transfer"].ratio("hidden"),
        "vs_reference": transfer.ratio("hidden", "reference"),
        "vs_reference_probs": transfer.ratio("probs", "reference"),
        "vs_reference_compute": compute.ratio("hidden", "reference"),
        "four_clients_vs_one": transfer.ratio("four clients, probs", "probs"),
        "four_clients_vs_one_hidden": transfer.ratio("four clients, hidden", "hidden"),
        # How many times as many tokens the fastest client had; and the same the other way round.
        "fairness": 1 / slowest,
        "slowest_over_fastest": slowest,
        "padded_vs_reference": padded.ratio("hidden", "reference"),
        **bounds,
        "projection_extra_mb": measure_projection(sys.executable, models["transfer"]),
        "bytes_per_token": measured_bytes(transfer),
        "reference": VERSION,
        "rounds": rounds,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a contender's round (default %(default)s)")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    print_result(run(arguments.rounds, arguments.seconds))


if __name__ == "__main__":
    main()
