"""Pauses after failures."""

from __future__ import annotations

from eagle_target.backoff import backoff


def test_pauses_double_up_to_the_longest() -> None:
    assert [backoff(count, first=1.0, longest=30.0) for count in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]


def test_an_outage_of_days_is_no_overflow() -> None:
    assert backoff(100_000, first=0.5, longest=30.0) == 30.0


def test_a_first_pause_over_the_longest_is_the_longest() -> None:
    assert backoff(1, first=60.0, longest=30.0) == 30.0
