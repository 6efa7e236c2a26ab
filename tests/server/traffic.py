"""A server that has had two clients, a problem of each kind and a refused connection."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.protocol import messages
from eagle_target.testing.server import loopback_server
from tests.client.batches import rows_of
from tests.server.cases import TestRunner, mapping_of, wait_until
from tests.server.http import ask, connected

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from eagle_target.server.run import HttpServer

BATCHES = 3


@contextlib.contextmanager
def busy_server(**settings: Any) -> Iterator[HttpServer]:
    """Serve, have work done, and keep both clients connected."""
    with (
        loopback_server(TestRunner, **settings) as server,
        client_of(server, "wire") as first,
        client_of(server, "shm") as second,
    ):
        for seed in range(BATCHES):
            for target in (first, second):
                target.generate_batch(**rows_of(seed))
        assert ask(server.url, "POST", messages.SUPERVISION, b"nonsense").status == 400
        with connected(server.url) as connection:
            connection.sendall(b"GET /" + b"x" * (1 << 16))
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 431")
        wait_until(lambda: metric(server, "eagle_target_request_seconds_count") == 2 * BATCHES + 1)
        yield server


@contextlib.contextmanager
def client_of(server: HttpServer, transport: str) -> Iterator[RemoteEagle3TargetModel]:
    with RemoteEagle3TargetModel.from_urls([server.url], transport=transport, encoding="probs") as target:
        target.set_vocab_mapping(mapping_of())
        yield target


def metrics_text(server: HttpServer, headers: Mapping[str, str] | None = None) -> str:
    return ask(server.url, "GET", messages.METRICS, headers=headers).body.decode()


def metric(server: HttpServer, name: str, **labels: str) -> float | None:
    """A sample's value; None where there is none."""
    for family in text_string_to_metric_families(metrics_text(server)):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def documented_metrics(server: HttpServer) -> dict[str, tuple[set[str], str]]:
    """Labels and kind of each metric that a server has, under the name the documentation gives it."""
    found: dict[str, tuple[set[str], str]] = {}
    for family in text_string_to_metric_families(metrics_text(server)):
        # The text format spells an info metric as a gauge, and has a gauge for when each counter began.
        if family.name.endswith("_created"):
            continue
        kind = "info" if family.name.endswith("_info") else family.type
        name = f"{family.name}_total" if kind == "counter" else family.name
        found[name] = ({label for sample in family.samples for label in sample.labels} - {"le"}, kind)
    return found
