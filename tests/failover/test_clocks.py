"""Wall clocks that jump, at either end, change nothing: every deadline and lease is measured by a steady clock."""

from __future__ import annotations

import ast
import re
import time
from pathlib import Path

import pytest

from eagle_target.protocol import messages
from tests.failover.clocks import DAY, jumping, server_with_clock
from tests.failover.runs import client, run, server_of
from tests.faults.processes import faulty_server
from tests.server.http import ask

ROOT = Path(__file__).parents[2]
BATCHES = 8
LEASE_SECONDS = 1.5
JUMPS = (DAY, -DAY, 3650 * DAY, -400.0, 0.0)


@pytest.mark.parametrize("transport", ["wire", "shm", "nccl"])
def test_a_server_whose_clock_jumps_keeps_its_clients(transport: str) -> None:
    with (
        server_with_clock({"delay": 0.005}, channel_lease=LEASE_SECONDS) as server,
        client(server.url, transport=transport, max_retries=0, retry_timeout=0.0) as target,
    ):
        for offset in JUMPS:
            run(target, BATCHES, {4: lambda offset=offset: setattr(server.offset, "value", offset)})  # type: ignore[misc]
            # Longer than a lease, in which the client's renewals come over the jumped clock.
            time.sleep(LEASE_SECONDS / 5)
        time.sleep(1.2 * LEASE_SECONDS)
        run(target, BATCHES)
        facts = server_of(target, server.url)
        assert (facts["transport"], facts["fallbacks"], facts["healthy"]) == (transport, 0, True)
        assert target.model_info()["traffic"]["retries"] == 0
        expired = re.findall(r"^eagle_target_expired_channels\S* (\S+)$", metrics_of(server.url), re.MULTILINE)
        assert not any(float(count) for count in expired)


@pytest.mark.parametrize("transport", ["wire", "shm", "nccl"])
def test_a_trainer_whose_clock_jumps_goes_on(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offset = 0.0
    jumping(lambda: offset, monkeypatch)
    with (
        faulty_server({"delay": 0.005}, channel_lease=LEASE_SECONDS) as server,
        client(server.url, transport=transport, max_retries=0, retry_timeout=0.0) as target,
    ):
        for offset in JUMPS:  # noqa: B007 - the clock reads it
            run(target, 4)
        assert target.model_info()["traffic"]["retries"] == 0


def metrics_of(url: str) -> str:
    return ask(url, "GET", messages.METRICS).body.decode()


def test_nothing_that_serves_or_asks_is_timed_by_the_wall_clock() -> None:
    """Of the packages that run in a server or a trainer; what a status page shows, or a log line says, may be dated."""
    for folder in ("eagle_target/client", "transports"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    assert (node.value.id, node.attr) not in {
                        ("time", "time"),
                        ("time", "time_ns"),
                        ("datetime", "now"),
                    }
