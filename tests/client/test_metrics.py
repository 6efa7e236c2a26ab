"""What a trainer's own Prometheus registry gets of a client."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest

from eagle_target.client import balancer
from eagle_target.client.metrics import ClientMetrics
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.testing.server import loopback_server
from tests.client.batches import rows_of

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def test_health_and_traffic_are_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 60.0)
    registry = CollectorRegistry()
    with loopback_server() as good, loopback_server() as dying:
        urls = [dying.url, good.url]
        with RemoteEagle3TargetModel.from_urls(urls, transport="wire", encoding="logits") as target:
            registry.register(ClientMetrics(target))
            dying.close()
            for seed in range(3):
                target.generate_batch(**rows_of(seed))

            def value(name: str, **labels: str) -> float | None:
                return registry.get_sample_value(f"eagle_target_client_{name}", labels)

            assert value("server_healthy", url=good.url, transport="wire") == 1
            assert value("server_healthy", url=dying.url, transport="wire") == 0
            assert value("server_failures_in_a_row", url=dying.url, transport="wire") == 1
            assert (value("server_paused_seconds", url=dying.url, transport="wire") or 0) > 0
            assert (value("requests_total"), value("retries_total")) == (3, 1)
            assert value("received_bytes_total") == target.model_info()["traffic"]["bytes_received"]
            assert (value("stage_seconds_total", stage="forward") or 0) > 0


def test_the_table_names_every_metric() -> None:
    registry = CollectorRegistry()
    with loopback_server() as server, RemoteEagle3TargetModel.from_urls([server.url], encoding="logits") as target:
        registry.register(ClientMetrics(target))
        exported = {line.split()[2] for line in generate_latest(registry).decode().splitlines() if "# TYPE" in line}
    assert exported == set(
        re.findall(r"^\| `(eagle_target_client_\w+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    )
