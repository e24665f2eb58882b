"""What benchmarks compute from what they measure."""

from __future__ import annotations

import math
import statistics

from experiments.benchmarks import mixed_fleet, slow_down

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
    assert slow_down.steps_to_reach([BEFORE] * 7 + [AFTER] * 53 + [BEFORE] * 2 + [AFTER] * 28) == 7


def test_runs_that_never_settle_count() -> None:
    assert slow_down.median_steps([3, None, None]) == math.inf
    assert slow_down.median_steps([3, 5, None]) == 5


def test_the_net_has_the_size_that_is_claimed() -> None:
    assert abs(sum(p.numel() for p in mixed_fleet.make_net().parameters()) / 1.10e6 - 1) < 0.005


def test_the_oracle_knows_the_best_that_solo_speeds_at_its_own_shares_can_tell() -> None:
    """Steps of ``c + k b``: all workers are ready at the same time, whatever odd measurement there was."""
    fixed, each = [0.02, 0.02, 0.04, 0.04], [1e-4, 2e-4, 4e-4, 4e-4]
    oracle = mixed_fleet.Oracle(1024, 4)
    assert oracle.shares == [256] * 4

    def times() -> list[float]:
        return [c + k * b for c, k, b in zip(fixed, each, oracle.shares, strict=True)]

    def learn(*factors: float) -> None:
        factors = factors or (1.0,) * 4
        oracle.learn([f * b / t for f, b, t in zip(factors, oracle.shares, times(), strict=True)])

    learn()
    once = max(times()) / statistics.mean(times())
    assert once > 1.15, "what one measurement at equal shares says"
    for _ in range(5):
        learn()
    assert max(times()) / statistics.mean(times()) < 1.02
    learn(0.5, 1, 1, 1)
    assert max(times()) / statistics.mean(times()) < 1.02


def test_a_step_together_takes_as_long_as_its_slowest_worker_and_chance_alone_costs_something() -> None:
    assert mixed_fleet.together_s([[1.0, 3.0, 1.0], [2.0, 2.0, 2.0, 99.0]]) == (2.0 + 3.0 + 2.0) / 3
    assert mixed_fleet.together_s([[0.5] * 4] * 3) == 0.5
    assert mixed_fleet.speed_of(10, [0.5, 1.5]) == 10.0
