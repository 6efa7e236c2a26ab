"""How many servers, what depth, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eagle_target.bench.measuring import Cell, Endpoint
from eagle_target.bench.report import Rates, advice_lines, advise, nine_of_ten, rates_of
from eagle_target.errors import ConfigError
from eagle_target.verify.workload import Workload

RATES = Rates(batch_tokens=16_384, server_tokens=10_000.0, latency=2.0, client_seconds=0.1, batch_bytes=5e8)


def test_servers_cover_what_the_trainer_needs_with_a_tenth_to_spare() -> None:
    advice = advise(RATES, step_time=0.8)

    assert advice.needed_tokens == pytest.approx(20_480)
    assert advice.servers == 3  # two would have to be busy all the time, and more
    assert advice.busy == pytest.approx(20_480 / 30_000)
    assert advise(replace(RATES, server_tokens=23_000.0), step_time=0.8).servers == 1
    assert advise(replace(RATES, server_tokens=22_000.0), step_time=0.8).servers == 2


@pytest.mark.parametrize(("latency", "depth"), [(0.1, 2), (0.8, 2), (0.81, 3), (8.0, 11)])
def test_depth_covers_the_latency(latency: float, depth: int) -> None:
    fast = replace(RATES, server_tokens=1e6, latency=latency)

    assert advise(fast, step_time=0.8).depth == depth
    assert advise(fast, step_time=0.8).waiting_bytes == depth * 5e8


def test_each_server_has_a_batch_to_work_on() -> None:
    assert advise(replace(RATES, latency=0.1), step_time=0.1).depth == 20


def test_a_step_takes_time() -> None:
    with pytest.raises(ConfigError, match="over 0"):
        advise(RATES, step_time=0.0)


def test_advice_rests_on_the_best_rate_and_on_a_client_that_is_alone() -> None:
    workload = Workload(batch=2, seq=10)
    endpoint = Endpoint("hf", "http://nowhere")
    alone = Cell(endpoint, "wire", "hidden", 1, 1)
    crowd = Cell(endpoint, "wire", "hidden", 4, 2)
    unusable = Cell(endpoint, "shm", "hidden", 1, 1, problem="not offered")
    for cell, rate in ((alone, 20.0), (crowd, 50.0)):
        cell.rates, cell.batch_seconds, cell.requests = [rate], [1.0, 1.2], 2
        cell.stages, cell.tokens, cell.nbytes = {"transfer": 0.4, "assembly": 3.0}, 40, 4000

    [(cell, rates)] = rates_of([alone, crowd, unusable], workload)

    assert cell is alone
    assert (rates.server_tokens, rates.batch_tokens, rates.batch_bytes) == (50.0, 20, 2000.0)
    assert rates.latency == pytest.approx(1.18)
    lines = advice_lines(cell, rates, step_time=1.0)
    assert lines[0] == "hf, wire, hidden: 1 server, prefetch depth 3"
    assert "more servers do not help" in lines[-1]


def test_nine_of_ten() -> None:
    assert nine_of_ten([3.0]) == 3.0
    assert nine_of_ten([float(number) for number in range(11)]) == 9.0
