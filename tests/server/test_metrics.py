"""The metrics: as documented, as counted, and as the dashboard and the alerts use them."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import promql_parser
import pytest
import yaml
from eagle_target_inprocess.transport import process_identity

from eagle_target.protocol import messages
from eagle_target.testing.server import loopback_server
from tests.server.cases import TestRunner, mapping_of, request_of
from tests.server.http import ask, body_of, put_mapping
from tests.server.traffic import BATCHES, busy_server, documented_metrics, metric, metrics_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.server.run import HttpServer

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = DOCS / "grafana" / "eagle-target.json"
ALERTS = DOCS / "grafana" / "alerts.yaml"
PAGE = (DOCS / "operations.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `((?:eagle_target|process)_\w+)` \|([^|]*)\| (\w+) \|", re.MULTILINE)
# Prometheus has it of every scrape.
UP = "up"
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with busy_server() as server:
        yield server


def test_the_table_names_what_a_server_has(server: HttpServer) -> None:
    table = {name: ({*re.findall(r"`(\w+)`", labels)}, kind) for name, labels, kind in ROW.findall(PAGE)}

    assert len(ROW.findall(PAGE)) == len(table)
    assert table == documented_metrics(server)


def test_every_name_ends_with_a_unit(server: HttpServer) -> None:
    units = "requests|problems|tokens|bytes|seconds|sequences|channels|clients|connections|fallbacks|restarts|forwards"
    for name in documented_metrics(server):
        if name.startswith("eagle_target") and name not in {"eagle_target_state", "eagle_target_served_info"}:
            assert re.search(rf"_({units})(_total)?$", name), name


def test_work_is_counted_by_outcome_transport_and_stage(server: HttpServer) -> None:
    assert metric(server, "eagle_target_requests_total", outcome="answered", status="200") == 2 * BATCHES
    assert metric(server, "eagle_target_requests_total", outcome="malformed-body", status="400") == 1
    assert metric(server, "eagle_target_problems_total", problem="malformed-body") == 1
    assert metric(server, "eagle_target_problems_total", problem="headers-too-large") == 1
    for transport in ("wire", "shm"):
        assert (metric(server, "eagle_target_sent_bytes_total", transport=transport) or 0) > 1000
    for stage in ("read", "queue", "forward", "projection", "send"):
        assert metric(server, "eagle_target_stage_seconds_count", stage=stage) == 2 * BATCHES
    assert metric(server, "eagle_target_channels", transport="shm") == 1
    assert (metric(server, "eagle_target_received_bytes_total") or 0) > 1000
    assert (metric(server, "eagle_target_connections") or 0) >= 2
    # The second client asked for the sequences of the first.


def test_the_state_and_what_is_served_are_told(server: HttpServer) -> None:
    states = {state: metric(server, "eagle_target_state", state=state) for state in ("ready", "loading", "failed")}
    assert states == {"ready": 1.0, "loading": 0.0, "failed": 0.0}
    info = next(line for line in metrics_text(server).splitlines() if line.startswith("eagle_target_served_info{"))
    assert 'engine="embedding"' in info
    assert f'fingerprint="{server.engine.served.fingerprint}"' in info


def test_a_client_that_falls_to_another_transport_is_counted_once() -> None:
    with loopback_server(TestRunner) as server:
        put_mapping(server.url, mapping_of())
        hello = json.dumps({"process": process_identity()}).encode()

        def send(client: str, transport: str, passed_over: str = "") -> None:
            headers = {messages.CLIENT: client, messages.TRANSPORT: transport, messages.PASSED_OVER: passed_over}
            if transport != "wire":
                opened = ask(server.url, "POST", f"{messages.TRANSPORTS}/{transport}/channels", hello)
                headers[messages.CHANNEL] = opened.json()["channel"]
            answer = ask(server.url, "POST", messages.SUPERVISION, body_of(request_of([4])), headers)
            assert answer.status == 200, answer.body

        def fallbacks() -> float | None:
            return metric(server, "eagle_target_fallbacks_total", transport="inprocess", to="wire")

        assert fallbacks() == 0.0
        send("never-had-it", "wire", "inprocess")
        assert fallbacks() == 0.0
        send("had-it", "inprocess")
        for _ in range(2):
            send("had-it", "wire", "inprocess,unheard-of")
        assert fallbacks() == 1.0
        send("had-it", "inprocess")
        send("had-it", "wire")
        assert fallbacks() == 1.0, "a client that asks for another transport has not fallen"
        assert metric(server, "eagle_target_passed_over_requests_total", transport="inprocess") == 3
        assert "unheard-of" not in metrics_text(server)


def test_probes_that_are_told_to_wait_are_no_problems() -> None:
    with loopback_server(TestRunner) as server:
        server.engine.drain()
        assert ask(server.url, "GET", messages.READY).status == 503
        assert metric(server, "eagle_target_problems_total", problem="draining") is None
        assert metric(server, "eagle_target_state", state="draining") == 1


def names_of(expression: str) -> set[str]:
    """The metrics of a PromQL expression."""
    text = expression.replace("$__rate_interval", "5m")
    found: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(str(node.name))
        for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
            child = getattr(node, name, None)
            if child is not None and not isinstance(child, str):
                visit(child)
        for child in getattr(node, "args", []):
            visit(child)

    visit(promql_parser.parse(text))
    return found


def exported(server: HttpServer) -> set[str]:
    names = {UP}
    for name, (_, kind) in documented_metrics(server).items():
        names |= {name + suffix for suffix in SUFFIXES.get(kind, ("",))}
    return names


def test_names_are_found_wherever_they_stand() -> None:
    assert names_of('sum by (a) (rate(x_total{b="c"}[5m])) / on (d) (y + z offset 1m) and deriv(w[1h]) > 2') == {
        "x_total",
        "y",
        "z",
        "w",
    }


def test_the_dashboard_uses_metrics_that_exist(server: HttpServer) -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    used = set()
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            names = names_of(target["expr"])
            assert names, target["expr"]
            used |= names
    assert used <= exported(server)
    ours = {name for name, (_, kind) in documented_metrics(server).items() if name.startswith("eagle_target")}
    unused = ours - {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert unused == {"eagle_target_received_bytes_total"}


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert (dashboard["uid"], dashboard["id"]) == ("eagle-target", None)
    assert dashboard["schemaVersion"] >= 39
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len({*ids}) == len(ids)
    for first, second in combinations([panel["gridPos"] for panel in dashboard["panels"]], 2):
        assert not overlap(first, second), (first, second)
    datasource, instance = dashboard["templating"]["list"]
    assert (datasource["name"], datasource["type"], datasource["query"]) == ("datasource", "datasource", "prometheus")
    assert instance["query"]["query"] == "label_values(eagle_target_served_info, instance)"


def overlap(first: dict[str, int], second: dict[str, int]) -> bool:
    across = first["x"] < second["x"] + second["w"] and second["x"] < first["x"] + first["w"]
    return across and first["y"] < second["y"] + second["h"] and second["y"] < first["y"] + first["h"]


def test_the_alerts_use_metrics_that_exist_and_are_documented(server: HttpServer) -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]
    for rule in rules:
        names = names_of(rule["expr"])
        assert names <= exported(server), rule["alert"]
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"]
        promql_parser.parse_duration(rule.get("for", "1m"))
    documented = re.findall(r"^\| `(EagleTarget\w+)`", PAGE, re.MULTILINE)
    assert documented == [rule["alert"] for rule in rules]
