"""Rounds over combinations, with clients that only say they measured."""

from __future__ import annotations

from typing import Any

import pytest

from eagle_target.bench.measuring import Cell, Endpoint, Measurement, make_cells
from eagle_target.bench.plan import Plan
from eagle_target.bench.report import cell_json, cells_table, console, problems
from eagle_target.errors import ConfigError
from eagle_target.verify.workload import Workload

ENDPOINTS = [Endpoint("one", "http://one"), Endpoint("two", "http://two")]
WORKLOAD = Workload(batch=2, seq=10)


class StandIn:
    """A client process that tells of two batches of `seconds`."""

    def __init__(self, log: list[tuple[Any, ...]], seconds: float) -> None:
        self._log = log
        self._seconds = seconds
        self.asked: dict[str, Any] = {}

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        if command == "connect":
            self.asked = arguments
            if arguments["transport"] == "none":
                return {"error": "not offered"}
            return {"transport": "wire"}
        if command == "run":
            self._log.append((self.asked["url"], self.asked["encoding"], arguments["depth"], self.asked["seed"]))
            if self.asked["encoding"] == "logits":
                return {"error": "the server is gone"}
            return {
                "seconds": [self._seconds, self._seconds],
                "tokens": 20,
                "requests": 4,
                "received_tokens": 80,
                "received_bytes": 800,
                "stages": {"forward": 2.0, "transfer": 1.0},
                "peak_rss_mb": 100.0 * self._seconds,
            }
        return {}


def measure(*encodings: str, transports: tuple[str, ...] = ("wire",), rounds: int = 2) -> tuple[list[Cell], list[Any]]:
    log: list[tuple[Any, ...]] = []
    cells = make_cells(ENDPOINTS, transports, encodings, [1, 2], [2])
    workers = [StandIn(log, 1.0), StandIn(log, 2.0)]
    Measurement(workers, WORKLOAD).run(cells, rounds=rounds, seconds=0.0)
    return cells, log


def test_rates_of_clients_add_up_and_the_slowest_is_told() -> None:
    cells, _ = measure("hidden")
    alone, pair = cells[:2]

    assert (alone.rate, pair.rate) == (20.0, 30.0)
    assert pair.slowest_over_fastest == 0.5
    assert pair.bytes_per_token == 10.0
    assert pair.client_peak_mb == 200.0
    assert pair.stage_ms() == {"forward": 500.0, "transfer": 250.0}
    assert len(pair.rates) == 2


def test_clients_are_told_how_many_share_their_machine() -> None:
    worker = StandIn([], 1.0)
    Measurement([worker, StandIn([], 1.0)], WORKLOAD).measure(Cell(ENDPOINTS[0], "wire", "hidden", 2, 1), seconds=0.0)

    assert worker.asked["clients"] == 2


def test_every_round_begins_with_another_combination_and_clients_ask_for_batches_of_their_own() -> None:
    _, log = measure("hidden", "probs", rounds=3)
    rounds = [[entry for entry in log[start : start + 12] if entry[3] == 0] for start in (0, 12, 24)]

    assert len({entries[0] for entries in rounds}) > 1
    assert all(sorted(entries) == sorted(rounds[0]) for entries in rounds)
    assert {entry[3] for entry in log} == {0, 1}


def test_what_cannot_be_used_is_a_row_with_the_reason() -> None:
    cells, log = measure("hidden", transports=("wire", "none"))

    assert [cell.problem for cell in cells if cell.transport == "none"] == ["not offered"] * 4
    assert len(log) == 2 * 6
    assert problems(cells) == ["one none hidden: not offered", "two none hidden: not offered"]
    table = cells_table(cells, WORKLOAD)
    assert table.row_count == 4 + 2
    assert cell_json(cells[-1])["problem"] == "not offered"
    console().print(table)


def test_a_combination_that_breaks_on_its_way_is_not_measured_again() -> None:
    cells, log = measure("logits", rounds=3)

    assert {cell.problem for cell in cells} == {"the server is gone"}
    assert len([entry for entry in log if entry[3] == 0]) == len(cells)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to measure"),
        ({"launches": {"hf": "python"}}, "need --model"),
        ({"targets": {"hf": "u"}, "launches": {"hf": "p"}, "model": "m"}, "both have"),
        ({"targets": {"hf": "u"}, "launch_options": {"vllm": ["a=b"]}}, "names \\['vllm'\\]"),
        ({"targets": {"hf": "u"}, "rounds": 0}, "at least 1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**settings)
