"""A whole run: servers that are there or are started, client processes, every combination, and parity beside it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eagle_target.auth import AccessFiles, open_access
from eagle_target.bench.launching import run_server, serve_command
from eagle_target.bench.measuring import Cell, Endpoint, Measurement, make_cells
from eagle_target.bench.processes import Worker
from eagle_target.bench.server_memory import MetricsMemory, ProcessMemory
from eagle_target.config import ClientConfig
from eagle_target.errors import ConfigError
from eagle_target.plugins.options import build_model
from eagle_target.verify.verification import compare_servers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from eagle_target.verify.workload import Workload

CLIENT = "eagle_target.bench.client"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    targets: URLs of servers, by name. launches: interpreters of engines' environments, by engine.
    model: what launched servers serve. launch_options: `key=value` of their adapters, by engine.
    rounds, seconds: of each combination. has_parity: whether further targets are compared with the first.
    access: how clients show who they are to the targets.

    Raises:
        ConfigError: nothing to measure, a name twice, or servers to start without a model.
    """

    targets: Mapping[str, str] = field(default_factory=dict)
    launches: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    launch_options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    transports: Sequence[str] = ("auto",)
    encodings: Sequence[str] = ("hidden",)
    clients: Sequence[int] = (1,)
    depths: Sequence[int] = (2,)
    rounds: int = 3
    seconds: float = 3.0
    device: str = "cpu"
    has_parity: bool = True
    access: AccessFiles = field(default_factory=AccessFiles)

    def __post_init__(self) -> None:
        if not self.targets and not self.launches:
            raise ConfigError("there is nothing to measure: name servers with --target, or start some with --launch")
        if self.launches and not self.model:
            raise ConfigError("--launch starts servers, which need --model")
        twice = {*self.targets} & {*self.launches}
        if twice:
            raise ConfigError(f"--target and --launch both have {sorted(twice)}: give them names of their own")
        unknown = {*self.launch_options} - {*self.launches}
        if unknown:
            raise ConfigError(f"--launch-option names {sorted(unknown)}, started are {sorted(self.launches)}")
        if min(*self.clients, *self.depths, self.rounds) < 1:
            raise ConfigError("clients, depth and rounds must be at least 1")


def run_plan(plan: Plan, workload: Workload, report: Callable[[str], None]) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Measure every combination; whatever happens, what was started is ended.

    Returns:
        the combinations, and the comparisons of further targets with the first.

    Raises:
        BenchmarkError: a server could not be started, or a client process is gone.
        ConfigError: a file of `access` cannot be used.
    """
    access = open_access(build_model(ClientConfig, plan.access, "access"))
    with ExitStack() as running:
        endpoints = [
            Endpoint(name, url.rstrip("/"), MetricsMemory(url.rstrip("/"), access))
            for name, url in plan.targets.items()
        ]
        for engine, python in plan.launches.items():
            report(f"starting {engine}")
            options = plan.launch_options.get(engine, ())
            command = serve_command(python, engine, plan.model or "", options=options)
            server = running.enter_context(run_server(command))
            endpoints.append(Endpoint(engine, server.url, ProcessMemory(server.process.pid)))
        workers = [running.enter_context(Worker(CLIENT)) for _ in range(max(plan.clients))]
        cells = make_cells(endpoints, plan.transports, plan.encodings, plan.clients, plan.depths)
        measurement = Measurement(workers, workload, device=plan.device, access=plan.access, report=report)
        measurement.run(cells, rounds=plan.rounds, seconds=plan.seconds)
        parity: list[dict[str, Any]] = []
        if plan.has_parity and len(endpoints) > 1:
            report("comparing what they give")
            urls = [endpoint.url for endpoint in endpoints]
            parity = compare_servers(urls, transport="wire", draft_vocab=workload.draft_vocab, access=plan.access)
            for result, endpoint in zip(parity, endpoints[1:], strict=True):
                result |= {"target": endpoint.name, "reference_target": endpoints[0].name}
    return cells, parity
