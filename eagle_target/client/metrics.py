"""Prometheus metrics of one client, for the trainer's own registry. docs/reliability.md has the table of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client.metrics_core import Metric

    from eagle_target.client.remote import RemoteEagle3TargetModel
    from eagle_target.contract.model_info import ServerState, TrafficTotals

PREFIX = "eagle_target_client"


class ClientMetrics(Collector):
    """Each server's health and what has travelled, as `model_info` tells them; reading them asks no server.

    `prometheus_client.REGISTRY.register(ClientMetrics(target))` exports them beside the trainer's metrics.

    Args:
        target: the client.
    """

    def __init__(self, target: RemoteEagle3TargetModel) -> None:
        self._target = target

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now."""
        info = self._target.model_info()
        yield from _of_servers(info["servers"])
        yield from _of_traffic(info["traffic"])


def _of_servers(servers: Sequence[ServerState]) -> Iterator[Metric]:
    gauges: tuple[tuple[str, str, Callable[[ServerState], float]], ...] = (
        (
            "server_healthy",
            "1 if the server's last request went well, or none was asked yet.",
            lambda server: server["healthy"],
        ),
        (
            "server_failures_in_a_row",
            "Requests that failed since the last one that went well.",
            lambda server: server["failures"],
        ),
        ("server_paused_seconds", "Until the server is tried again.", lambda server: server["paused_seconds"]),
        ("server_outstanding_requests", "Requests under way.", lambda server: server["outstanding"]),
    )
    for name, text, value in gauges:
        gauge = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["url", "transport"])
        for server in servers:
            gauge.add_metric([server["url"], server["transport"]], float(value(server)))
        yield gauge
    fallbacks = CounterMetricFamily(
        f"{PREFIX}_fallbacks", "Times a transport broke and another was taken.", labels=["url"]
    )
    for server in servers:
        fallbacks.add_metric([server["url"]], server["fallbacks"])
    yield fallbacks


def _of_traffic(traffic: TrafficTotals) -> Iterator[Metric]:
    counters = (
        ("requests", "Batches that were answered.", traffic["requests"]),
        ("tokens", "Tokens supervised.", traffic["tokens"]),
        ("received_bytes", "Answers, in HTTP bodies and beside them.", traffic["bytes_received"]),
        ("retries", "Attempts that were made again.", traffic["retries"]),
    )
    for name, text, value in counters:
        yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)
    stages = CounterMetricFamily(f"{PREFIX}_stage_seconds", "Where requests' time went.", labels=["stage"])
    for stage, seconds in traffic["seconds"].items():
        stages.add_metric([stage], seconds)
    yield stages
