"""Every transport on the same supervision, in one run on one machine, beside the reference's wire.

    python -m benchmarks.transports      # or: make bench-transports

Supervision of Llama-3.1-8B's sizes (153 kB a token: aux of 3 x 4096 bfloat16, probs of 32 000 float32) lies ready in
the server; the server writes it to where the transport wants it, as a projection does. Each transport has a real server
and real clients in processes of their own; `inprocess` has both in one. `nccl` runs over TCP: the tensors are on the
CPU.

transfer   from the supervision being made to its tensors in the client's hands: the time of a request less what the
           server says it spent in the queue and in making it. gbps = bytes / that
batch      from the call of `generate_batch` to the finished batch: with the making, and with scattering the rows into
           the trainer's padded layout, which are the same work under every transport
cycle      from the request to the tensors in hand, the making included; four clients in four processes at once against
           one: their bytes a second together

The reference (`nemo-automodel` from PyPI, its own server and client) has no such stages: its batch is compared with the
wire's batch. The transports take turns, round after round; figures are medians. What is received is compared with what
was sent before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from benchmarks.processes import Worker
from benchmarks.reference import VERSION, reference_python
from benchmarks.report import describe_machine, print_result, print_table, spread

if TYPE_CHECKING:
    from collections.abc import Callable

SIDE = "benchmarks.transport_side"
REFERENCE_SIDE = "benchmarks.wire_sides.reference"
TRANSPORTS = ("inprocess", "shm", "nccl", "wire")
CLIENTS = 4
# Tokens of a batch by what its supervision weighs: 152 584 bytes each.
SIZES = {"1 MB": 7, "30 MB": 200, "300 MB": 2048, "1 GB": 7040}
MAIN_SIZE = "300 MB"


class Pair:
    """A transport's server, and its clients. inprocess has one process for both ends."""

    def __init__(self, transport: str, processes: ExitStack, clients: int) -> None:
        self.transport = transport
        most = str(max(SIZES.values()))
        if transport == "inprocess":
            self.server = processes.enter_context(Worker(SIDE, "both", transport, most))
            self.clients = [self.server]
            return
        self.server = processes.enter_context(Worker(SIDE, "server", transport, most))
        url = f"http://127.0.0.1:{self.server.ask('port')['port']}"
        self.clients = [processes.enter_context(Worker(SIDE, "client", url, transport)) for _ in range(clients)]

    def check(self) -> None:
        """Compare what is received with what was sent.

        Raises:
            SystemExit: they differ.
        """
        sent = self.server.ask("sent" if self.transport == "inprocess" else "digest")
        for client in self.clients:
            if client.ask("digest") != sent:
                raise SystemExit(f"{self.transport} does not carry what was sent: its figures would mean nothing")


def measure_sizes(pairs: list[Pair], rounds: int) -> dict[str, dict[str, list[float]]]:
    """GB/s of transfers by transport and size, one client."""
    gbps: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for size, tokens in SIZES.items():
        count = 20 if tokens < 100 else 3
        for number in range(rounds + 1):
            for pair in _in_turn(pairs, number):
                answer = pair.clients[0].ask("transfers", count=count, tokens=tokens)
                if number:  # the first round warms up
                    gbps[pair.transport][size] += [answer["bytes"] / seconds / 1e9 for seconds in answer["seconds"]]
    return gbps


def measure_batches(pairs: list[Pair], reference: Worker, rounds: int) -> dict[str, list[float]]:
    """Seconds of a 300 MB batch by transport, one client, and of the reference."""
    seconds: dict[str, list[float]] = defaultdict(list)
    asking: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (pair.transport, lambda client=pair.clients[0]: client.ask("batches", count=3, tokens=SIZES[MAIN_SIZE]))  # type: ignore[misc]
        for pair in pairs
    ]
    asking.append(("reference", lambda: reference.ask("batches", count=2, hold=0)))
    for number in range(rounds + 1):
        turn = number % len(asking)
        for name, ask in asking[turn:] + asking[:turn]:
            taken = ask()["seconds"]
            if number:
                seconds[name] += taken
    return seconds


def measure_crowds(pairs: list[Pair], rounds: int) -> dict[str, list[float]]:
    """Bytes a second of all clients together over one client's, by transport."""
    ratios: dict[str, list[float]] = defaultdict(list)
    count = 3

    def ask(client: Worker) -> list[float]:
        cycles: list[float] = client.ask("transfers", count=count, tokens=SIZES[MAIN_SIZE])["cycles"]
        return cycles

    for number in range(rounds + 1):
        for pair in _in_turn([pair for pair in pairs if len(pair.clients) > 1], number):
            alone = statistics.median(ask(pair.clients[0]))
            with ThreadPoolExecutor(len(pair.clients)) as threads:
                together = max(sum(cycles) for cycles in threads.map(ask, pair.clients)) / count
            if number:
                ratios[pair.transport].append(len(pair.clients) * alone / together)
    return ratios


def _in_turn(pairs: list[Pair], number: int) -> list[Pair]:
    turn = number % len(pairs)
    return pairs[turn:] + pairs[:turn]


def run(rounds: int) -> dict[str, Any]:
    """Measure everything and return the figures."""
    python = reference_python()
    print(describe_machine())
    with ExitStack() as processes:
        pairs = [Pair(transport, processes, CLIENTS) for transport in TRANSPORTS]
        for pair in pairs:
            pair.check()
        reference_server = processes.enter_context(Worker(REFERENCE_SIDE, "server", python=python))
        url = f"http://127.0.0.1:{reference_server.ask('port')['port']}"
        reference = processes.enter_context(Worker(REFERENCE_SIDE, "client", url, python=python))
        gbps = measure_sizes(pairs, rounds)
        batches = measure_batches(pairs, reference, rounds)
        crowds = measure_crowds(pairs, rounds)
    return report(gbps, batches, crowds, rounds)


def report(
    gbps: dict[str, dict[str, list[float]]],
    batches: dict[str, list[float]],
    crowds: dict[str, list[float]],
    rounds: int,
) -> dict[str, Any]:
    """Print the tables and return what ends the run."""
    print_table(
        "GB/s of a transfer, one client",
        ("transport", *SIZES),
        [(name, *(spread(sizes[size]) for size in SIZES)) for name, sizes in gbps.items()],
    )
    print_table(
        f"{MAIN_SIZE}: seconds a batch, and four clients' throughput over one's",
        ("transport", "seconds a batch", "four / one"),
        [
            (
                f"reference {VERSION}" if name == "reference" else name,
                spread(taken, ".3f"),
                spread(crowds[name]) if name in crowds else "",
            )
            for name, taken in batches.items()
        ],
    )
    median = {name: statistics.median(sizes[MAIN_SIZE]) for name, sizes in gbps.items()}
    batch = {name: statistics.median(taken) for name, taken in batches.items()}
    return {
        "gbps": median,
        "shm_vs_wire": median["shm"] / median["wire"],
        "nccl_vs_wire": median["nccl"] / median["wire"],
        "wire_vs_reference": batch["reference"] / batch["wire"],
        "four_clients_vs_one": {name: statistics.median(ratios) for name, ratios in crowds.items()},
        "batch_seconds": batch,
        "gbps_by_size": {
            name: {size: statistics.median(values) for size, values in sizes.items()} for name, sizes in gbps.items()
        },
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default %(default)s)")
    print_result(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
