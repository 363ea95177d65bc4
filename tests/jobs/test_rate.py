"""A job's speed limit, on a clock of the test's own."""

from __future__ import annotations

import pytest

from livedisk.jobs import rate
from livedisk.jobs.rate import SLICE, RateLimit


class Clock:
    """Stands still but when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rate, "time", made)
    return made


def test_each_chunk_is_paid_for_before_the_next(clock: Clock) -> None:
    limit = RateLimit()
    limit.account(100)
    assert limit.delay() == 0, "no limit"
    limit.set(100)
    assert limit.delay() == 0
    limit.account(50)
    assert limit.delay() == pytest.approx(0.5)
    clock.now += 0.5
    assert limit.delay() == 0


def test_one_who_wakes_late_is_as_fast_as_the_limit_all_the_same(clock: Clock) -> None:
    limit = RateLimit()
    limit.set(1000)
    moved, began = 0, clock.now
    while moved < 10_000:
        clock.now += limit.delay() + SLICE / 2  # late for every turn
        limit.account(100)
        moved += 100
    assert clock.now - began == pytest.approx(10, abs=2 * SLICE)


def test_what_was_missed_in_a_long_pause_is_lost(clock: Clock) -> None:
    limit = RateLimit()
    limit.set(1000)
    clock.now += 3600
    limit.account(1000)
    assert limit.delay() == pytest.approx(1 - SLICE)
