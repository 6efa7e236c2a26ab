"""Prometheus metrics of one server."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.server.channels import Channels
    from eagle_target.server.engine import TargetModelServer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


class Metrics:
    """Counters of one server, on a registry of its own."""

    def __init__(self, server: TargetModelServer, channels: Channels) -> None:
        self._registry = CollectorRegistry()
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

    def count_status(self, status: int) -> None:
        """Count one answered supervision request."""
        self._requests.labels(status=str(status)).inc()

    def count_supervision(self, *, tokens: int, transport: str, sent_bytes: int, timings: Mapping[str, float]) -> None:
        """Count one request's work; timings in seconds by stage."""
        self._tokens.inc(tokens)
        self._bytes.labels(transport=transport).inc(sent_bytes)
        for stage, seconds in timings.items():
            self._stages.labels(stage=stage).observe(seconds)

    def count_passed_over(self, names: str) -> None:
        """Count the transports, comma-separated, that a request's client passed over; others' names are dropped."""
        for name in {*names.split(",")} & {*self._channels.names}:
            self._passed_over.labels(transport=name).inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)
