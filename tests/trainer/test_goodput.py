"""Time belongs to exactly one category."""

from __future__ import annotations

import pytest

from jaxserve.trainer.goodput import CATEGORIES, Goodput
from jaxserve.watchdog import Watchdog


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_categories_sum_to_the_wall_time() -> None:
    clock = Clock()
    goodput = Goodput(clock)
    for number, category in enumerate(CATEGORIES):
        clock.now_s += number + 0.5
        goodput.switch(category)
    clock.now_s += 3
    goodput.move(1.0, "step", "data_wait")
    goodput.move(1e9, "restart", "lost_work")
    seconds = goodput.seconds()
    assert sum(seconds.values()) == pytest.approx(goodput.wall_s)
    assert seconds["restart"] == 0
    assert seconds["idle"] == 3
    summary = goodput.summary()
    assert summary["goodput"] == pytest.approx(seconds["step"] / goodput.wall_s, abs=1e-4)


def test_watchdog_limit_follows_the_median_step() -> None:
    watchdog = Watchdog(60, 1800, 0.0)
    assert not watchdog.is_overdue(1799, is_patient=False)
    assert watchdog.is_overdue(1801, is_patient=False)
    watchdog.step(300.0, 300)  # The first one compiles.
    assert watchdog.is_overdue(361, is_patient=False)
    for number in range(9):
        watchdog.step(20.0, 320 + 20 * number)
    assert not watchdog.is_overdue(480 + 199, is_patient=False)
    assert watchdog.is_overdue(480 + 201, is_patient=False)
    assert not watchdog.is_overdue(480 + 201, is_patient=True)
    watchdog.reset(700)
    assert not watchdog.is_overdue(800, is_patient=False)
