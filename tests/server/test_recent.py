"""The ring of samples, the figures and the plots the status page is made of."""

from __future__ import annotations

import re

import pytest
from jinja2 import UndefinedError

from eagle_target.server.recent import SAMPLE_SECONDS, SAMPLES, Recent
from eagle_target.server.status.environment import ceiling, duration, environment, grouped, seconds, si, utc


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_samples_are_of_five_seconds_and_the_last_ten_minutes() -> None:
    clock = Clock()
    recent = Recent(clock=clock)
    recent.count(tokens=7, sent_bytes=70)
    clock.now += 2
    recent.count(tokens=3, sent_bytes=30)
    assert len(recent.samples()) == SAMPLES
    assert sum(sample.tokens for sample in recent.samples()) == 0, "the present sample is not over"
    clock.now += SAMPLE_SECONDS
    assert (recent.samples()[-1].tokens, recent.samples()[-1].requests, recent.samples()[-1].sent_bytes) == (10, 2, 100)
    clock.now += 3 * SAMPLE_SECONDS
    assert [sample.tokens for sample in recent.samples()[-5:]] == [0, 10, 0, 0, 0]
    clock.now += SAMPLES * SAMPLE_SECONDS
    assert sum(sample.tokens for sample in recent.samples()) == 0
    recent.count(tokens=1, sent_bytes=1)
    clock.now += 1e9
    assert len(recent.samples()) == SAMPLES


def test_rates_are_of_the_last_minute_or_since_the_start() -> None:
    clock = Clock()
    recent = Recent(clock=clock)
    assert recent.rates().tokens == 0
    clock.now += 2
    recent.count(tokens=100, sent_bytes=200)
    assert (recent.rates().tokens, recent.rates().sent_bytes, recent.rates().requests) == (50, 100, 0.5)
    clock.now += 600
    assert recent.rates().tokens == 0
    for _ in range(60):
        clock.now += 1
        recent.count(tokens=10, sent_bytes=0)
    assert recent.rates().tokens == pytest.approx(10, rel=0.05)


def test_stages_and_problems_are_summed_up() -> None:
    clock, wall = Clock(), Clock()
    recent = Recent(clock=clock, wall=wall)
    recent.count_stage("forward", 1.0)
    clock.now += 7
    recent.count_stage("forward", 3.0)
    spent = recent.stages()["forward"]
    assert (spent.requests, spent.seconds, spent.longest) == (2, 4.0, 3.0)
    recent.count_problem("contract", 422)
    wall.now += 5
    recent.count_problem("queue-full", 503)
    recent.count_problem("queue-full", 503)
    assert [(seen.name, seen.count, seen.status) for seen in recent.problems()] == [
        ("queue-full", 2, 503),
        ("contract", 1, 422),
    ]
    clock.now += SAMPLE_SECONDS
    assert recent.samples()[-1].problems == 3


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (si(0), "0"),
        (si(7), "7"),
        (si(999.4), "999"),
        (si(999.6), "1 k"),
        (si(1234567), "1.23 M"),
        (si(None, "B"), "-"),
        (si(0, "B"), "0 B"),
        (si(8 << 30, "B"), "8.59 GB"),
        (seconds(0.00012), "0.12 ms"),
        (seconds(0.0123), "12.3 ms"),
        (seconds(75), "75 s"),
        (duration(0.4), "0 s"),
        (duration(184), "3 min 4 s"),
        (duration(3600), "1 h"),
        (duration(7 * 86400 + 8 * 3600 + 59), "7 d 8 h"),
        (grouped(1234567.4), "1,234,567"),
        (grouped(None), ""),
        (utc(0), "1970-01-01 00:00:00 UTC"),
    ],
)
def test_figures_are_as_people_read_them(shown: str, text: str) -> None:
    assert shown == text


@pytest.mark.parametrize(
    ("value", "end"),
    [(0, 1), (0.28, 0.3), (0.02, 0.02), (1, 1), (1.1, 2), (999, 1000), (20_200, 30_000), (5e9, 6e9)],
)
def test_the_axis_ends_at_a_round_number(value: float, end: float) -> None:
    assert ceiling(value) == pytest.approx(end)


def test_a_plot_stays_in_its_frame() -> None:
    source = """{% from "status/plot.html" import plot %}{{ plot("<Tokens>", [0, 25, 50], [0, 1, 0], 5.0) }}"""
    drawn = environment().from_string(source).render()
    points = re.search(r'<polyline class="line" points="([^"]+)"', drawn)
    assert points is not None
    assert points[1] == "100.0,120.0 300.0,60.0 500.0,0.0"
    assert drawn.count("<rect") == 1
    assert 'aria-label="&lt;Tokens&gt;: at most 10, last 10"' in drawn


def test_a_figure_that_a_template_misspells_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="no_such_figure"):
        environment().from_string("{{ no_such_figure }}").render()
