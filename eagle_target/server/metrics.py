"""Prometheus metrics of one server."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from eagle_target.server.channels import Channels
    from eagle_target.server.engine import TargetModelServer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


class Metrics:
    """Counters of one server, on a registry of its own."""

    def __init__(self, server: TargetModelServer, channels: Channels) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "eagle_target_requests", "Supervision requests by HTTP status.", ["status"], registry=self._registry
        )
        self._tokens = Counter("eagle_target_tokens", "Tokens supervised.", registry=self._registry)
        self._bytes = Counter(
            "eagle_target_sent_bytes",
            "Bytes sent, in HTTP bodies and beside them, by transport.",
            ["transport"],
            registry=self._registry,
        )
        self._stages = Histogram(
            "eagle_target_stage_seconds",
            "Seconds of a request by stage.",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=self._registry,
        )
        self._passed_over = Counter(
            "eagle_target_passed_over_requests",
            "Requests whose client would have taken this transport, but could not.",
            ["transport"],
            registry=self._registry,
        )
        self._channels = channels
        self._open_channels = Gauge(
            "eagle_target_channels", "Open channels, by transport.", ["transport"], registry=self._registry
        )
        for name in channels.names:
            self._open_channels.labels(transport=name).set_function(partial(channels.count, name))
        self._expired = Gauge(
            "eagle_target_expired_channels", "Channels closed because their client was silent.", registry=self._registry
        )
        self._expired.set_function(channels.expired.total)
        waiting = Gauge("eagle_target_queue_requests", "Requests that wait for the engine.", registry=self._registry)
        waiting.set_function(lambda: server.waiting)
        running = Gauge("eagle_target_engine_requests", "Requests in the forward that runs.", registry=self._registry)
        running.set_function(lambda: server.running)
        outbox = Gauge(
            "eagle_target_outbox_bytes", "Answers that are being made or not sent yet.", registry=self._registry
        )
        outbox.set_function(lambda: server.outbox.held_bytes)
        peak = Gauge("eagle_target_outbox_peak_bytes", "The most of those at a time.", registry=self._registry)
        peak.set_function(lambda: server.outbox.peak_bytes)
        cached = Gauge("eagle_target_cache_bytes", "Supervision kept for later.", registry=self._registry)
        cached.set_function(lambda: 0 if server.cache is None else server.cache.held_bytes)
        self._registry.register(_EngineTotals(server))

    def count_status(self, status: int) -> None:
        """Count one answered supervision request."""
        self._requests.labels(status=str(status)).inc()

    def count_supervision(self, *, tokens: int, transport: str, sent_bytes: int, timings: Mapping[str, float]) -> None:
        """Count one request's work; timings in seconds by stage."""
        self._tokens.inc(tokens)
        self._bytes.labels(transport=transport).inc(sent_bytes)
        for stage, seconds in timings.items():
            self.count_stage(stage, seconds)

    def count_stage(self, stage: str, seconds: float) -> None:
        """Count one request's time in a stage."""
        self._stages.labels(stage=stage).observe(seconds)

    def count_passed_over(self, names: str) -> None:
        """Count the transports, comma-separated, that a request's client passed over; others' names are dropped."""
        for name in {*names.split(",")} & {*self._channels.names}:
            self._passed_over.labels(transport=name).inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


class _EngineTotals(Collector):
    """What the engine counts itself."""

    def __init__(self, server: TargetModelServer) -> None:
        self._server = server

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counters as they are."""
        cache = self._server.cache
        hits, misses = (0, 0) if cache is None else (cache.hits, cache.misses)
        totals = {
            "eagle_target_padded_tokens": ("Tokens computed for padding.", self._server.padded_tokens),
            "eagle_target_cache_hits": ("Sequences answered from the cache.", hits),
            "eagle_target_cache_misses": ("Sequences the cache did not have.", misses),
        }
        for name, (help_text, value) in totals.items():
            yield CounterMetricFamily(name, help_text, value=value)
