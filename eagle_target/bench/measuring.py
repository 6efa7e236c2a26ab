"""Runs the same requests against servers: every combination in turn, round after round, and what each took."""

from __future__ import annotations

import itertools
import logging
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.auth import AccessFiles
    from eagle_target.bench.server_memory import ServerMemory
    from eagle_target.verify.workload import Workload

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """A server. name: in tables. memory: how its memory is known, where it is."""

    name: str
    url: str
    memory: ServerMemory | None = None


class Asked(Protocol):
    """A process that is told what to do: a `Worker`."""

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Have a command run and return its answer."""
        ...


@dataclass(slots=True)
class Cell:
    """One combination, and what was measured of it.

    clients: processes that ask at the same time. depth: batches each has on their way.
    problem: why it could not be measured.
    rates: tokens a second of all clients together, by round. client_rates: by round and client.
    batch_seconds: between a client's batches. stages: seconds of all requests, by stage.
    """

    endpoint: Endpoint
    transport: str
    encoding: str
    clients: int
    depth: int
    problem: str | None = None
    used_transport: str = ""
    rates: list[float] = field(default_factory=list)
    client_rates: list[list[float]] = field(default_factory=list)
    batch_seconds: list[float] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    requests: int = 0
    tokens: int = 0
    nbytes: int = 0
    server_peak_mb: float | None = None
    client_peak_mb: float | None = None

    @property
    def combination(self) -> tuple[str, str, str]:
        """What a client has to be able to use."""
        return self.endpoint.name, self.transport, self.encoding

    @property
    def rate(self) -> float:
        """Median over the rounds, tokens a second."""
        return statistics.median(self.rates)

    @property
    def bytes_per_token(self) -> float:
        """Received, for each real token."""
        return self.nbytes / self.tokens

    @property
    def slowest_over_fastest(self) -> float:
        """Of the clients' rates; the median over the rounds."""
        return statistics.median(min(rates) / max(rates) for rates in self.client_rates)

    def stage_ms(self) -> dict[str, float]:
        """Milliseconds a request, by stage."""
        return {stage: 1000 * seconds / self.requests for stage, seconds in self.stages.items()}

    def add_round(self, answers: Sequence[dict[str, Any]], server_peak_mb: float | None) -> None:
        """Count what the clients told of one round."""
        rates = [answer["tokens"] * len(answer["seconds"]) / sum(answer["seconds"]) for answer in answers]
        self.rates.append(sum(rates))
        self.client_rates.append(rates)
        for answer in answers:
            self.batch_seconds += answer["seconds"]
            self.requests += answer["requests"]
            self.tokens += answer["received_tokens"]
            self.nbytes += answer["received_bytes"]
            for stage, seconds in answer["stages"].items():
                self.stages[stage] = self.stages.get(stage, 0.0) + seconds
            self.client_peak_mb = max(self.client_peak_mb or 0.0, answer["peak_rss_mb"])
        if server_peak_mb is not None:
            self.server_peak_mb = max(self.server_peak_mb or 0.0, server_peak_mb)


class Measurement:
    """Takes cells through their rounds with a pool of client processes.

    Args:
        workers: client processes, as many as the largest cell has clients. workload: what they ask for.
        device: where their batches go. access: how they show who they are. report: told of each step.
    """

    def __init__(
        self,
        workers: Sequence[Asked],
        workload: Workload,
        *,
        device: str = "cpu",
        access: AccessFiles | None = None,
        report: Callable[[str], None] = logger.info,
    ) -> None:
        self._workers = workers
        self._workload = workload
        self._device = device
        self._access = dict(access or {})
        self._report = report

    def run(self, cells: Sequence[Cell], *, rounds: int, seconds: float) -> None:
        """Measure every cell in every round, in an order that moves on. What cannot be used is found out first."""
        self._warm_up(cells)
        for number in range(rounds):
            usable = [cell for cell in cells if cell.problem is None]
            turn = number % len(usable) if usable else 0
            for place, cell in enumerate(usable[turn:] + usable[:turn], start=1):
                self._report(f"round {number + 1} of {rounds}, {place} of {len(usable)}: {describe(cell)}")
                self.measure(cell, seconds)

    def _warm_up(self, cells: Sequence[Cell]) -> None:
        """One batch of each combination; its problem is that of every cell that has it."""
        by_combination = itertools.groupby(
            sorted(cells, key=lambda cell: cell.combination), key=lambda cell: cell.combination
        )
        for _, group in by_combination:
            alike = list(group)
            self._report(f"warming up: {describe(alike[0])}")
            answer = self._connect(self._workers[0], alike[0], 0)
            self._workers[0].ask("disconnect")
            for cell in alike:
                cell.problem = answer.get("error")
                cell.used_transport = answer.get("transport", "")

    def measure(self, cell: Cell, seconds: float) -> None:
        """One round of one cell: connect, warm up, run, disconnect."""
        workers = self._workers[: cell.clients]
        memory = cell.endpoint.memory
        with ThreadPoolExecutor(len(workers)) as threads:
            try:
                connected = threads.map(self._connect, workers, itertools.repeat(cell), itertools.count())
                answers: list[dict[str, Any]] = list(connected)
                if memory is not None:
                    memory.start()
                if not any("error" in answer for answer in answers):
                    answers = list(
                        threads.map(lambda worker: worker.ask("run", seconds=seconds, depth=cell.depth), workers)
                    )
                peak = None if memory is None else memory.stop()
            finally:
                list(threads.map(lambda worker: worker.ask("disconnect"), workers))
        cell.problem = next((answer["error"] for answer in answers if "error" in answer), None)
        if cell.problem is None:
            cell.add_round(answers, peak)

    def _connect(self, worker: Asked, cell: Cell, seed: int) -> dict[str, Any]:
        return worker.ask(
            "connect",
            url=cell.endpoint.url,
            transport=cell.transport,
            encoding=cell.encoding,
            workload=self._workload.to_json(),
            seed=seed,
            device=self._device,
            access=self._access,
            clients=cell.clients,
        )


def make_cells(
    endpoints: Sequence[Endpoint],
    transports: Sequence[str],
    encodings: Sequence[str],
    clients: Sequence[int],
    depths: Sequence[int],
) -> list[Cell]:
    """Every combination."""
    return [Cell(*combination) for combination in itertools.product(endpoints, transports, encodings, clients, depths)]


def describe(cell: Cell) -> str:
    """A cell in words."""
    clients = f"{cell.clients} client{'s' if cell.clients > 1 else ''}"
    return f"{cell.endpoint.name}, {cell.transport}, {cell.encoding}, {clients}, depth {cell.depth}"
