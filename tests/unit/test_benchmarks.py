"""What benchmarks compute from what they measure."""

from __future__ import annotations

import math

from experiments.benchmarks import slow_down

CORES = [0.8, 0.4, 0.2, 0.2]
BEFORE, AFTER = [512, 256, 128, 128], [342, 342, 170, 170]


def test_shares_that_never_change_have_not_followed() -> None:
    assert slow_down.steps_to_settle([BEFORE] * 90) == 0
    assert not slow_down.has_followed(BEFORE, BEFORE, CORES, 0, 0.5)
    assert not slow_down.has_followed(BEFORE, [480, 272, 136, 136], CORES, 0, 0.5)
    assert slow_down.has_followed(BEFORE, AFTER, CORES, 0, 0.5)
    assert slow_down.has_followed(AFTER, BEFORE, [0.4, 0.4, 0.2, 0.2], 0, 2.0)


def test_shares_that_are_near_and_leave_again_have_not_settled_yet() -> None:
    assert slow_down.steps_to_settle([AFTER] * 3 + [BEFORE] * 57 + [AFTER] * 30) == 60
    assert slow_down.steps_to_settle([BEFORE] * 7 + [AFTER] * 83) == 7
    assert slow_down.steps_to_settle([AFTER] * 89 + [BEFORE]) is None


def test_runs_that_never_settle_count() -> None:
    assert slow_down.median_steps([3, None, None]) == math.inf
    assert slow_down.median_steps([3, 5, None]) == 5
