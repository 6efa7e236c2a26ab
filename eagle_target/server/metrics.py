"""Prometheus metrics of one server. docs/operations.md has the table of them."""

from __future__ import annotations

import importlib.metadata
from collections import OrderedDict
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from eagle_target.errors import Unavailable
from eagle_target.server.engine.lifecycle import State
from eagle_target.server.recent import STAGES, Recent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from eagle_target.server.channels import Channels
    from eagle_target.server.engine.server import TargetModelServer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
ANSWERED = "answered"
MAX_REMEMBERED_CLIENTS = 1024
# What alerts watch is there from the start: the first increase of a counter that is new goes unseen.
FIRST_OUTCOMES = ((ANSWERED, 200), ("engine-failed", 500), ("queue-full", 503))
FIRST_PROBLEMS = ("engine-failed", "internal", "queue-full", "too-many-connections", "unauthorized")


class Metrics:
    """Counters of one server, on a registry of its own; `recent` has the last minutes of some of them."""

    def __init__(self, server: TargetModelServer, channels: Channels) -> None:
        self.recent = Recent()
        self._channels = channels
        self._last_transport: OrderedDict[str, str] = OrderedDict()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._count_requests()
        self._begin()
        self._show_gauges(server)
        self._registry.register(_ServerTotals(server, channels))

    def _count_requests(self) -> None:
        counter = partial(Counter, registry=self._registry)
        histogram = partial(Histogram, buckets=SECONDS_BUCKETS, registry=self._registry)
        self._requests = counter(
            "eagle_target_requests", "Supervision requests by outcome and HTTP status.", ["outcome", "status"]
        )
        self._problems = counter("eagle_target_problems", "Problems answered, on any route.", ["problem"])
        self._tokens = counter("eagle_target_tokens", "Tokens supervised.")
        self._bytes = counter(
            "eagle_target_sent_bytes", "Bytes sent, in HTTP bodies and beside them, by transport.", ["transport"]
        )
        self._received = counter("eagle_target_received_bytes", "Bytes of the bodies of supervision requests.")
        self._seconds = histogram(
            "eagle_target_request_seconds", "Seconds from a request's headers to the end of its answer."
        )
        self._stages = histogram("eagle_target_stage_seconds", "Seconds of a request by stage.", ["stage"])
        self._passed_over = counter(
            "eagle_target_passed_over_requests",
            "Requests whose client would have taken this transport, but could not.",
            ["transport"],
        )
        self._fallbacks = counter(
            "eagle_target_fallbacks", "Times a client stepped down from one transport to another.", ["transport", "to"]
        )

    def _begin(self) -> None:
        for outcome, status in FIRST_OUTCOMES:
            self._requests.labels(outcome=outcome, status=str(status))
        for problem in FIRST_PROBLEMS:
            self._problems.labels(problem=problem)
        for stage in STAGES:
            self._stages.labels(stage=stage)
        for name in self._channels.names:
            self._bytes.labels(transport=name)
            self._passed_over.labels(transport=name)
        for name, other in permutations(self._channels.names, 2):
            self._fallbacks.labels(transport=name, to=other)

    def _show_gauges(self, server: TargetModelServer) -> None:
        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(name, text, registry=self._registry).set_function(value)

        gauge("eagle_target_queue_requests", "Requests that wait for the engine.", lambda: server.waiting)
        gauge("eagle_target_engine_requests", "Requests in the forward that runs.", lambda: server.running)
        gauge(
            "eagle_target_outbox_bytes",
            "Answers that are being made or not sent yet.",
            lambda: server.outbox.held_bytes,
        )
        gauge("eagle_target_connected_clients", "Clients that are connected.", server.clients.count)
        gauge("eagle_target_outbox_peak_bytes", "The most of those at a time.", lambda: server.outbox.peak_bytes)
        channels = Gauge(
            "eagle_target_channels", "Open channels, by transport.", ["transport"], registry=self._registry
        )
        for name in self._channels.names:
            channels.labels(transport=name).set_function(partial(self._channels.count, name))

    def watch_connections(self, count: Callable[[], int]) -> None:
        """Show how many connections are open."""
        Gauge("eagle_target_connections", "Open HTTP connections.", registry=self._registry).set_function(count)

    def count_request(self, outcome: str, status: int) -> None:
        """Count one supervision request; outcome: `answered`, or the last part of the problem's type."""
        self._requests.labels(outcome=outcome, status=str(status)).inc()

    def count_problem(self, name: str, status: int) -> None:
        """Count one problem, on any route, by the last part of its type."""
        self._problems.labels(problem=name).inc()
        self.recent.count_problem(name, status)

    def count_supervision(self, *, tokens: int, transport: str, sent_bytes: int, timings: Mapping[str, float]) -> None:
        """Count one request's work; timings in seconds by stage."""
        self._tokens.inc(tokens)
        self._bytes.labels(transport=transport).inc(sent_bytes)
        self.recent.count(tokens=tokens, sent_bytes=sent_bytes)
        for stage, seconds in timings.items():
            self.count_stage(stage, seconds)

    def count_stage(self, stage: str, seconds: float) -> None:
        """Count one request's time in a stage."""
        self._stages.labels(stage=stage).observe(seconds)
        self.recent.count_stage(stage, seconds)

    def count_received(self, nbytes: int) -> None:
        """Count the body of one supervision request."""
        self._received.inc(nbytes)

    def count_seconds(self, seconds: float) -> None:
        """Count how long one supervision request took in all."""
        self._seconds.observe(seconds)

    def count_transport(self, client: str, transport: str, passed_over: str) -> None:
        """Count the transports that a request's client passed over, and its step down from the one it had.

        Args:
            client: its id. transport: what this request takes.
            passed_over: names, comma-separated; others than those offered are dropped.
        """
        better = {*passed_over.split(",")} & {*self._channels.names}
        for name in better:
            self._passed_over.labels(transport=name).inc()
        before = self._last_transport.pop(client, transport)
        if before in better:
            self._fallbacks.labels(transport=before, to=transport).inc()
        self._last_transport[client] = transport
        if len(self._last_transport) > MAX_REMEMBERED_CLIENTS:
            self._last_transport.popitem(last=False)

    def look(self) -> Look:
        """Every value as of now."""
        return Look(self._registry)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


class Look:
    """The values of all metrics at one moment."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._samples = [sample for family in registry.collect() for sample in family.samples]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of a metric's samples that have these labels, and maybe more; None where there is none."""
        wanted = labels.items()
        values = [sample.value for sample in self._samples if sample.name == name and wanted <= sample.labels.items()]
        return sum(values) if values else None


class _ServerTotals(Collector):
    """What the server's parts count themselves."""

    def __init__(self, server: TargetModelServer, channels: Channels) -> None:
        self._server = server
        self._channels = channels

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are."""
        yield from self._states()
        expired = CounterMetricFamily(
            "eagle_target_expired_channels", "Channels closed because their client was silent.", labels=["transport"]
        )
        for name in self._channels.names:
            expired.add_metric([name], self._channels.expired[name])
        yield expired
        totals = {
            "eagle_target_engine_restarts": ("Times the engine was loaded again.", self._server.restarts),
            "eagle_target_stuck_forwards": ("Calls of the engine that did not return.", self._server.stuck_forwards),
            "eagle_target_padded_tokens": ("Tokens computed for padding.", self._server.padded_tokens),
        }
        for name, (help_text, value) in totals.items():
            yield CounterMetricFamily(name, help_text, value=value)

    def _states(self) -> Iterator[Metric]:
        state = GaugeMetricFamily("eagle_target_state", "1 for the state the server is in.", labels=["state"])
        for name in get_args(State):
            state.add_metric([name], float(self._server.state == name))
        yield state
        facts = {"version": importlib.metadata.version("eagle-target")}
        try:
            served = self._server.served
        except Unavailable:
            served = None
        if served is not None:
            info = served.info
            facts |= {"model": info.model, "dtype": info.dtype, "engine": info.engine}
            facts |= {"engine_version": info.engine_version, "fingerprint": served.fingerprint}
        yield InfoMetricFamily("eagle_target_served", "What is served.", value=facts)
