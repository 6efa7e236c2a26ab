"""The wire path against the reference's and against a bare socket, in one run over loopback.

    python benchmarks/wire.py            # or: make bench-wire

One batch of Llama-3.1-8B's sizes: 2048 tokens, hidden 4096, so aux of 3 x 4096 bfloat16 and probs of 32 000 float32 a
token, 312 MB. Both sides run their real server and their real client, each in a process of its own, and only the
target's computation is replaced by tensors that lie ready. A batch is timed where a trainer waits for it: from the
call of `generate_batch` to the finished batch. The reference's client and server are `nemo-automodel` from PyPI.

The contenders take turns, round after round, in an order that moves on, so that whatever else the machine does meets
all of them. Figures are medians over all batches of all rounds, after warm-up batches that are not counted.

The bare socket is what no HTTP client can be expected to beat: two processes, `sendall` of a prepared buffer,
`recv_into` one buffer that is used again, nothing else done to the bytes. It comes in two variants, all bytes in one
call and in pieces of 4 MiB, because which is faster depends on how the system places the two processes. `fresh
buffer` is the latter with memory that is new for each batch, which a client that keeps no memory pays for, the
reference among them. `vs_socket` compares with the fastest of the three.

Every answer has a checksum, which both ends take of all its bytes; `no checksum` leaves it out. `one batch held` keeps
the last batch alive while it waits for the next, as a trainer that prefetches one batch ahead does. CPU seconds are
both processes' together: what is left where other work takes the cores. `hidden` is this project's compact encoding,
shown for its bytes: its time is the client's product with the draft's rows of the head, so it has no place in the
ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.processes import Worker
from benchmarks.reference import VERSION, reference_python
from benchmarks.report import describe_machine, print_result, print_table, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

SIDES = "benchmarks.wire_sides"
TOKENS = 2048
PIECE_BYTES = 4 << 20


@dataclass(slots=True)
class Contender:
    """One way to get the batch.

    arguments: of the client's command. seconds: of each round's batches. cpu_seconds: of both processes together, a
    batch of each round.
    """

    name: str
    server: Worker
    client: Worker
    batches: int
    arguments: dict[str, Any]
    body_bytes: int = 0
    seconds: list[list[float]] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def run(self, count: int, *, counted: bool) -> None:
        """Ask for batches."""
        before = self._cpu()
        answer = self.client.ask("batches", count=count, **self.arguments)
        self.body_bytes = answer["bytes"]
        if counted:
            self.cpu_seconds.append((self._cpu() - before) / count)
            self.seconds.append(answer["seconds"])

    @property
    def all_seconds(self) -> list[float]:
        """Of every batch."""
        return [seconds for batch in self.seconds for seconds in batch]

    @property
    def median_seconds(self) -> float:
        """Of a batch."""
        return statistics.median(self.all_seconds)

    @property
    def gbps(self) -> float:
        """Body bytes a second, in GB."""
        return self.body_bytes / self.median_seconds / 1e9

    @property
    def round_gbps(self) -> list[float]:
        """Of each round's median batch."""
        return [self.body_bytes / statistics.median(batch) / 1e9 for batch in self.seconds]

    def _cpu(self) -> float:
        return sum(float(worker.ask("cpu")["cpu_seconds"]) for worker in (self.server, self.client))


def check_same_batches(pairs: Sequence[tuple[Worker, Worker]]) -> None:
    """Refuse to publish figures of batches that differ from what was to be sent, or between the sides."""
    digests = {worker.ask("digest")["digest"] for pair in pairs for worker in pair}
    if len(digests) != 1:
        raise SystemExit("the batches are not the same on both sides: the figures would mean nothing")


def measure_hidden(processes: contextlib.ExitStack) -> Contender:
    """Two batches in the compact encoding, the second one counted."""
    server = processes.enter_context(Worker(f"{SIDES}.ours", "server", "--with-head"))
    url = f"http://127.0.0.1:{server.ask('port')['port']}"
    client = processes.enter_context(Worker(f"{SIDES}.ours", "client", url, "--encoding", "hidden"))
    hidden = Contender("ours, encoding hidden", server, client, 1, {"hold": 0})
    hidden.run(1, counted=False)
    hidden.run(1, counted=True)
    return hidden


def show(
    rows: Sequence[Contender], memory: dict[str, dict[str, float]], socket: Contender, reference: Contender
) -> None:
    """Print the table."""
    lines = []
    for row in rows:
        compared = row.body_bytes > reference.body_bytes // 2
        server, client = memory.get(f"{row.name} server"), memory.get(f"{row.name} client")
        lines.append(
            (
                row.name,
                f"{row.gbps:.2f}" if compared else "",
                f"{min(row.round_gbps):.2f}-{max(row.round_gbps):.2f}" if compared else "",
                spread(row.all_seconds, ".3f"),
                f"{statistics.median(row.cpu_seconds):.3f}",
                f"{row.body_bytes / TOKENS:,.0f}",
                f"{server['peak_rss_mb']:,.0f}" if server else "",
                f"{client['peak_rss_mb']:,.0f}" if client else "",
                f"{row.gbps / reference.gbps:.1f}" if compared else "",
                f"{row.gbps / socket.gbps:.2f}" if compared else "",
            )
        )
    columns = (
        "",
        "GB/s",
        "by round",
        "seconds a batch",
        "CPU seconds",
        "bytes a token",
        "server peak MB",
        "client peak MB",
        "x reference",
        "x socket",
    )
    print_table("Request to finished batch, 2048 tokens, over loopback", columns, lines)


def run(rounds: int) -> dict[str, Any]:
    """Measure everything and return the figures."""
    python = reference_python()
    print(describe_machine())
    with contextlib.ExitStack() as processes:

        def start(module: str, *arguments: str, **options: Any) -> Worker:
            return processes.enter_context(Worker(f"{SIDES}.{module}", *arguments, **options))

        def url_of(server: Worker) -> str:
            return f"http://127.0.0.1:{server.ask('port')['port']}"

        our_server, their_server = start("ours", "server"), start("reference", "server", python=python)
        our_client = start("ours", "client", url_of(our_server))
        their_client = start("reference", "client", url_of(their_server), python=python)
        ours = Contender("ours", our_server, our_client, 3, {"hold": 0})
        ours_held = Contender("ours, one batch held", our_server, our_client, 3, {"hold": 1})
        unchecked_client = start("ours", "client", url_of(our_server), "--no-checksum")
        unchecked = Contender("ours, no checksum", our_server, unchecked_client, 3, {"hold": 0})
        reference = Contender(f"reference {VERSION}", their_server, their_client, 2, {"hold": 0})
        ours.run(2, counted=False)
        reference.run(1, counted=False)
        # Before anything is held: what a loop needs that lets go of each batch.
        memory = {
            f"{contender.name} {end}": worker.ask("memory")
            for contender, pair in ((ours, (our_server, our_client)), (reference, (their_server, their_client)))
            for end, worker in zip(("server", "client"), pair, strict=True)
        }
        socket_server = start("raw_socket", "server", str(ours.body_bytes))
        socket_client = start("raw_socket", "client", str(socket_server.ask("port")["port"]), str(ours.body_bytes))
        sockets = [
            Contender(name, socket_server, socket_client, 3, {"hold": 0, "fresh": fresh, "piece": piece})
            for name, fresh, piece in (
                ("raw socket, one call", False, 0),
                ("raw socket, pieces", False, PIECE_BYTES),
                ("raw socket, fresh buffer", True, PIECE_BYTES),
            )
        ]
        contenders = [sockets[0], ours, reference, sockets[1], unchecked, ours_held, sockets[2]]
        for contender in (*sockets, unchecked, ours_held):
            contender.run(2, counted=False)
        for number in range(rounds):
            turn = number % len(contenders)
            for contender in contenders[turn:] + contenders[:turn]:
                contender.run(contender.batches, counted=True)
        memory[f"{ours_held.name} server"] = our_server.ask("memory")
        memory[f"{ours_held.name} client"] = our_client.ask("memory")
        check_same_batches([(our_server, our_client), (their_server, their_client)])
    with contextlib.ExitStack() as processes:
        hidden = measure_hidden(processes)
    best_socket = max(sockets, key=lambda contender: contender.gbps)
    show([ours, unchecked, ours_held, hidden, reference, *sockets], memory, best_socket, reference)
    return {
        "wire_gbps": ours.gbps,
        "reference_gbps": reference.gbps,
        "socket_gbps": best_socket.gbps,
        "vs_reference": ours.gbps / reference.gbps,
        "vs_socket": ours.gbps / best_socket.gbps,
        "checksum_seconds": ours.median_seconds - unchecked.median_seconds,
        "vs_unchecked": ours.gbps / unchecked.gbps,
        "held_gbps": ours_held.gbps,
        "held_vs_socket": ours_held.gbps / best_socket.gbps,
        "fresh_socket_gbps": sockets[-1].gbps,
        "seconds": {row.name: row.median_seconds for row in contenders},
        "cpu_seconds": {row.name: statistics.median(row.cpu_seconds) for row in contenders},
        "gbps_range": {row.name: [min(row.round_gbps), max(row.round_gbps)] for row in contenders},
        "bytes_per_token": {row.name: row.body_bytes / TOKENS for row in (ours, hidden, reference)},
        "peak_rss_mb": {name: figures["peak_rss_mb"] for name, figures in memory.items()},
        "rounds": rounds,
        "tokens": TOKENS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="rounds that count (default %(default)s)")
    print_result(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
