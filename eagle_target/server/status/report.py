"""What the status page tells, gathered from a running server."""

from __future__ import annotations

import importlib.metadata
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eagle_target.errors import Unavailable
from eagle_target.server.recent import SAMPLE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eagle_target.config import ServerConfig
    from eagle_target.contract.target import ServedTarget
    from eagle_target.server.channels import Channels
    from eagle_target.server.clients import ConnectedClient
    from eagle_target.server.engine.server import TargetModelServer
    from eagle_target.server.metrics import Metrics
    from eagle_target.server.recent import Rates, Sample, SeenProblem, StageTime

# What a server that has just started shows of its throughput.
FIRST_SAMPLES = 24


@dataclass(frozen=True, slots=True)
class TransportReport:
    """A transport that is offered: open channels, bytes sent, clients that stepped down from it."""

    name: str
    channels: int
    sent_bytes: float
    fallbacks: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A server at one moment. now: seconds since the epoch; what counts, counts from its start."""

    version: str
    model: str
    now: float
    uptime: float
    state: str
    failure: str | None
    served: ServedTarget | None
    encodings: Sequence[str]
    rates: Rates
    samples: Sequence[Sample]
    stages: Mapping[str, StageTime]
    waiting: int
    max_queue: int
    outbox_bytes: int
    max_outbox_bytes: int
    memory_bytes: float | None
    tokens: float
    requests: float
    restarts: float
    clients: Sequence[ConnectedClient]
    transports: Sequence[TransportReport]
    problems: Sequence[SeenProblem]


def gather(server: TargetModelServer, channels: Channels, metrics: Metrics, config: ServerConfig) -> Report:
    """Look at a server."""
    served = _served(server)
    recent, look = metrics.recent, metrics.look()
    samples = recent.samples()
    if recent.uptime < FIRST_SAMPLES * SAMPLE_SECONDS:
        samples = samples[-FIRST_SAMPLES:]
    return Report(
        version=importlib.metadata.version("eagle-target"),
        model=config.model if served is None else served.info.model,
        now=time.time(),
        uptime=recent.uptime,
        state=server.state,
        failure=_failure(server.failure, had_requests=served is not None),
        served=served,
        encodings=() if served is None else server.encodings,
        rates=recent.rates(),
        samples=samples,
        stages=recent.stages(),
        waiting=server.waiting,
        max_queue=config.max_queue,
        outbox_bytes=server.outbox.held_bytes,
        max_outbox_bytes=config.max_outbox_bytes,
        memory_bytes=look.total("process_resident_memory_bytes"),
        tokens=look.total("eagle_target_tokens_total") or 0.0,
        requests=look.total("eagle_target_request_seconds_count") or 0.0,
        restarts=look.total("eagle_target_engine_restarts_total") or 0.0,
        clients=server.connected_clients(),
        transports=[
            TransportReport(
                name,
                channels.count(name),
                sent_bytes=look.total("eagle_target_sent_bytes_total", transport=name) or 0.0,
                fallbacks=look.total("eagle_target_fallbacks_total", transport=name) or 0.0,
            )
            for name in channels.names
        ],
        problems=recent.problems(),
    )


def _served(server: TargetModelServer) -> ServedTarget | None:
    try:
        return server.served
    except Unavailable:
        return None


def _failure(failure: str | None, *, had_requests: bool) -> str | None:
    """Why a server does not serve. Of a failure that a request may have had part in, only the kind: see the log."""
    if failure is None or not had_requests:
        return failure
    kind, separator, _ = failure.partition(":")
    return f"{kind}: see the log" if separator and kind.isidentifier() else "see the log"
