"""Where a request's time went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eagle_target import RemoteEagle3TargetModel
from eagle_target.client.timings import STAGES, Traffic, received, server_seconds
from eagle_target.testing.tiny import EmbeddingRunner
from eagle_target.verify.workload import Workload

if TYPE_CHECKING:
    from eagle_target.testing.fixtures import ServeOnLoopback

SLOW_SECONDS = 0.2


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("queue;dur=1.5, forward;dur=2000.000", {"queue": 0.0015, "forward": 2.0}),
        ("queue;dur=soon, cache, forward;dur=1", {"forward": 0.001}),
        ("", {}),
    ],
)
def test_the_servers_stages_are_read_as_far_as_they_can_be(header: str, seconds: dict[str, float]) -> None:
    assert server_seconds(header) == pytest.approx(seconds)


def test_bytes_beside_the_body_count() -> None:
    answer = received({"Eagle-Target-Moved-Bytes": "90", "Server-Timing": "queue;dur=1"}, 10, transfer=0.5)

    assert answer.nbytes == 100
    assert answer.seconds == pytest.approx({"queue": 0.001, "transfer": 0.5})
    assert received({"Eagle-Target-Moved-Bytes": "many"}, 10, transfer=0.5).nbytes == 10


def test_sums_are_over_all_requests() -> None:
    traffic = Traffic()
    for _ in range(2):
        traffic.count(7, received({"Server-Timing": "queue;dur=1000"}, 10, transfer=0.5), assembly=0.25)

    assert traffic.totals(retries=3) == {
        "requests": 2,
        "tokens": 14,
        "bytes_received": 20,
        "seconds": {"queue": 2.0, "forward": 0.0, "projection": 0.0, "transfer": 1.0, "assembly": 0.5},
        "retries": 3,
    }


def test_a_client_tells_where_its_time_went(loopback_server: ServeOnLoopback) -> None:
    server = loopback_server(lambda: EmbeddingRunner(delay=SLOW_SECONDS))
    workload = Workload(batch=2, seq=16)
    with RemoteEagle3TargetModel.from_urls([server.url], encoding="hidden", transport="wire") as target:
        target.set_vocab_mapping(workload.make_mapping(211))
        for inputs in workload.make_inputs(211, seed=0)[:2]:
            target.generate_batch(*inputs)
        seconds = target.model_info()["traffic"]["seconds"]

    assert {*STAGES} <= {*seconds}
    assert seconds["forward"] >= 2 * SLOW_SECONDS
    assert all(seconds[stage] > 0 for stage in STAGES)
