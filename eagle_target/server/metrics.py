"""Prometheus metrics of one server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.server.engine import TargetModelServer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


class Metrics:
    """Counters of one server, on a registry of its own."""

    def __init__(self, server: TargetModelServer) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "eagle_target_requests", "Supervision requests by HTTP status.", ["status"], registry=self._registry
        )
        self._tokens = Counter("eagle_target_tokens", "Tokens supervised.", registry=self._registry)
        self._bytes = Counter(
            "eagle_target_sent_bytes",
            "Bytes of HTTP bodies sent, by transport.",
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
        waiting = Gauge("eagle_target_queue_requests", "Requests that wait for the engine.", registry=self._registry)
        waiting.set_function(lambda: server.waiting)
        running = Gauge("eagle_target_engine_requests", "Requests in the forward that runs.", registry=self._registry)
        running.set_function(lambda: server.running)

    def count_status(self, status: int) -> None:
        """Count one answered supervision request."""
        self._requests.labels(status=str(status)).inc()

    def count_supervision(self, *, tokens: int, transport: str, body_bytes: int, timings: Mapping[str, float]) -> None:
        """Count one request's work; timings in seconds by stage."""
        self._tokens.inc(tokens)
        self._bytes.labels(transport=transport).inc(body_bytes)
        for stage, seconds in timings.items():
            self._stages.labels(stage=stage).observe(seconds)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)
