"""Speeds follow from the steps that workers do, and shares from speeds: quickly, and without flapping."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
from typing import Any

import pytest

from raytrain_het.balance.batch_shares import StepCost, balanced_shares, slowest_s
from raytrain_het.balance.gradient_weights import effective_batch_size, gradient_weights, normalised_scores
from raytrain_het.balance.profile import Measurement, Profile
from raytrain_het.balance.scoreboard import Scoreboard
from raytrain_het.balance.speeds import Speeds
from raytrain_het.balance.step_time import StepTimeModel
from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError


class Fleet:
    """Workers with known costs; every step gives one observation of each, with noise."""

    def __init__(self, costs: list[StepCost], total: int, *, noise: float = 0.0, seed: int = 0, **settings: Any):
        self.costs, self.random, self.noise = costs, random.Random(seed), noise
        self.board = Scoreboard(HetConfig(**settings))
        self.board.global_batch_size = total
        self.shares = dict(enumerate(balanced_shares([StepCost(0, 1)] * len(costs), total)))
        self.changes = 0

    def step(self) -> None:
        for slot, cost in enumerate(self.costs):
            factor = math.exp(self.random.gauss(0, self.noise))
            samples = self.shares[slot] or 2  # Without a share it is its stand-in that is timed.
            self.board.observe(slot, samples, cost.step_s(samples) * factor)
        table = self.board.better(range(len(self.costs)), self.shares)
        if table is not None:
            self.shares, self.changes = table.shares, self.changes + 1

    def best(self) -> list[int]:
        return balanced_shares(self.costs, self.board.global_batch_size)

    def off(self) -> float:
        """How far the shares are from the best, at most, as a part of the best."""
        return max(abs(self.shares[i] - b) / b for i, b in enumerate(self.best()))


def brute_force(costs: list[StepCost], total: int) -> float:
    least = 2 if total >= 2 * len(costs) else 1
    ways = itertools.product(range(least, total + 1), repeat=len(costs) - 1)
    return min(slowest_s(costs, [*way, total - sum(way)]) for way in ways if total - sum(way) >= least)


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_within_one_samples_time_of_the_best_there_are(seed: int) -> None:
    chance = random.Random(seed)
    costs = [StepCost(chance.uniform(0, 5), chance.uniform(0.1, 3)) for _ in range(chance.choice((2, 3)))]
    total = chance.randint(len(costs), 30)
    shares = balanced_shares(costs, total)
    assert sum(shares) == total
    assert min(shares) >= 1
    assert slowest_s(costs, shares) <= brute_force(costs, total) + max(c.per_sample_s for c in costs)


def test_shares_of_equal_workers_are_equal_and_of_a_batch_too_small_an_error() -> None:
    assert balanced_shares([StepCost(0.1, 0.2)] * 4, 18) in ([5, 5, 4, 4], [4, 4, 5, 5])
    assert balanced_shares([StepCost(0, 1), StepCost(9, 1)], 5, minimum=0) == [5, 0]
    with pytest.raises(ValueError, match="lower minimum"):
        balanced_shares([StepCost(0, 1)] * 3, 2)
    with pytest.raises(ValueError, match=r"costs\[1\]"):
        balanced_shares([StepCost(0, 1), StepCost(0, 0)], 2)


@pytest.mark.parametrize("speeds", [(4, 2, 1, 1), (8, 1), (1, 1, 1), (1, 30)])
def test_a_fleet_comes_to_its_best_shares_within_some_steps(speeds: tuple[int, ...]) -> None:
    fleet = Fleet([StepCost(0.004, 0.001 / speed) for speed in speeds], 1024)
    for _ in range(16):
        fleet.step()
    costs, best = fleet.costs, fleet.best()
    shares = [fleet.shares[i] for i in range(len(costs))]
    assert slowest_s(costs, shares) <= 1.04 * slowest_s(costs, best)


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_tenth_causes_no_flapping(seed: int) -> None:
    fleet = Fleet([StepCost(0.002, 0.001 / s) for s in (4, 2, 1, 1)], 1024, noise=0.1, seed=seed)
    for _ in range(30):
        fleet.step()
    settled = fleet.changes
    for _ in range(200):
        fleet.step()
    assert fleet.changes - settled <= 6
    costs = fleet.costs
    assert slowest_s(costs, [fleet.shares[i] for i in range(4)]) <= 1.12 * slowest_s(costs, fleet.best())


def test_a_worker_slowed_to_half_has_its_new_share_within_ten_steps() -> None:
    steps = []
    for seed in range(5):
        fleet = Fleet([StepCost(0.002, 0.001 / s) for s in (4, 2, 2)], 1024, noise=0.03, seed=seed)
        for _ in range(40):
            fleet.step()
        fleet.costs[0] = StepCost(0.004, 0.002 / 4)
        needed = next(step for step in range(1, 50) if fleet.step() or fleet.off() < 0.1)
        steps.append(needed)
    assert statistics.median(steps) <= 10


def test_bad_moments_of_a_machine_that_all_share_are_no_change_of_anybodys_speed() -> None:
    fleet = Fleet([StepCost(0.01, 0.001 / s) for s in (4, 2, 1, 1)], 256, noise=0.05)
    for _ in range(40):
        fleet.step()
    changes, costs = fleet.changes, fleet.costs
    for _ in range(10):
        for slowdown in (1.3, 1.5, 1.4, 1.6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
            fleet.costs = [StepCost(slowdown * c.fixed_s, slowdown * c.per_sample_s) for c in costs]
            fleet.step()
    assert fleet.changes <= changes + 1


def test_a_machine_that_stays_slow_for_all_is_known_as_slow_after_a_while() -> None:
    fleet = Fleet([StepCost(0, 0.001 / s) for s in (2, 1)], 90)
    for _ in range(40):
        fleet.step()
    shares = fleet.shares
    fleet.costs = [StepCost(0, 2 * c.per_sample_s) for c in fleet.costs]
    for _ in range(60):
        fleet.step()
    assert fleet.shares == shares
    assert fleet.board.solo_samples_per_s(0, 60) == pytest.approx(1000, rel=0.02)


@pytest.mark.parametrize("num_told", [1, 7, 16])
@pytest.mark.parametrize("common", [True, False])
def test_many_bad_moments_for_a_long_time_leave_estimates_where_they_are(num_told: int, common: bool) -> None:
    speeds, rng = Speeds(), random.Random(0)
    for _ in range(300):
        moments = [[1 + 2 * rng.random() * (rng.random() < 0.25) for _ in range(num_told)] for _ in range(2)]
        for slot in range(2):
            for moment in moments[0 if common else slot]:
                speeds.observe(slot, 10, (0.1, 0.2)[slot] * moment * (1 + rng.gauss(0, 0.02)))
        assert speeds.round_is_over(range(2))
    assert [cost.step_s(10) for cost in speeds.costs([0, 1]).values()] == pytest.approx([0.1, 0.2], rel=0.05)


@pytest.mark.parametrize("num_told", [1, 8, 16, 100])
def test_a_table_comes_however_many_steps_are_told_at_once(num_told: int) -> None:
    board = Scoreboard(HetConfig())
    board.global_batch_size = 120
    shares = {0: 60, 1: 60}
    for _ in range(20):
        for slot, per_sample_s in enumerate((0.001, 0.003)):
            for _ in range(num_told):
                board.observe(slot, shares[slot], per_sample_s * shares[slot])
            table = board.better([0, 1], shares)
            shares = table.shares if table is not None else shares
    assert shares == {0: 90, 1: 30}


def test_fixed_parts_are_learnt_when_a_loss_makes_all_shares_larger_at_once() -> None:
    speeds, per_sample_s = Speeds(), (0.001, 0.002, 0.002)
    for shares in ({0: 50, 1: 25, 2: 25}, {0: 67, 1: 33}, {0: 50, 1: 25, 2: 25}):
        for _ in range(12):
            for slot, samples in shares.items():
                speeds.observe(slot, samples, 0.05 + per_sample_s[slot] * samples)
            assert speeds.round_is_over(shares)
    costs = speeds.costs([0, 1])
    assert [cost.fixed_s for cost in costs.values()] == pytest.approx([0.05, 0.05])
    assert [cost.per_sample_s for cost in costs.values()] == pytest.approx(per_sample_s[:2])


def test_a_worker_that_is_left_alone_at_a_slow_level_is_known_as_it_is() -> None:
    speeds = Speeds()
    for slots, slowdown, num_rounds in (((0, 1), 1, 20), ((0, 1), 2, 40), ((0,), 2, 30), ((0, 1), 2, 6)):
        for _ in range(num_rounds):
            for slot in slots:
                speeds.observe(slot, 50, slowdown * (0.1, 0.15)[slot])
            speeds.round_is_over(slots)
        assert speeds.cost(0).step_s(50) == pytest.approx(0.1 * slowdown)
    assert speeds.cost(1).step_s(50) == pytest.approx(0.3)


def test_one_odd_step_changes_nothing() -> None:
    model = StepTimeModel()
    for _ in range(10):
        model.observe(100, 1.0)
    model.observe(100, 30.0)
    assert model.cost is not None
    assert model.cost.step_s(100) == pytest.approx(1.0)


def test_the_fixed_part_is_learnt_from_two_batch_sizes_and_kept_when_the_machine_slows_down() -> None:
    model = StepTimeModel()
    for b in (100, 100, 200, 200):
        model.observe(b, 0.5 + 0.01 * b)
    assert model.cost is not None
    assert model.cost.fixed_s == pytest.approx(0.5)
    for _ in range(3):
        model.observe(200, 2 * (0.5 + 0.01 * 200))
    assert model.cost.fixed_s == pytest.approx(1.0)
    assert model.cost.per_sample_s == pytest.approx(0.02)


def test_nothing_is_said_before_every_worker_has_been_seen() -> None:
    board = Scoreboard(HetConfig())
    board.global_batch_size = 64
    for _ in range(10):
        board.observe(0, 32, 1.0)
    assert board.better([0, 1], {0: 32, 1: 32}) is None
    assert board.solo_samples_per_s(0, 32) == pytest.approx(32.0)
    assert board.solo_samples_per_s(1, 32) is None


def test_a_worker_that_costs_more_than_it_gives_is_a_warm_spare_and_comes_back_when_it_is_needed() -> None:
    costs = [StepCost(0.01, 0.001), StepCost(0.01, 0.001), StepCost(0.2, 0.001)]
    fleet = Fleet(costs, 200, warm_spares=True)
    for _ in range(30):
        fleet.step()
    assert fleet.shares == {0: 100, 1: 100, 2: 0}
    assert fleet.board.table is not None
    assert "worker 2 costs more than it gives, and is a warm spare" in fleet.board.table.reason
    fleet.costs[:2] = [StepCost(0.01, 0.005)] * 2
    for _ in range(10):
        fleet.step()
    assert fleet.shares[2] > 50


def test_a_spare_that_is_fast_again_gets_samples_again() -> None:
    usual = StepCost(0.004, 0.001)
    fleet = Fleet(
        [StepCost(0, 0.001), StepCost(0, 0.001), StepCost(20 * usual.fixed_s, 20 * usual.per_sample_s)],
        100,
        warm_spares=True,
    )
    for _ in range(30):
        fleet.step()
    assert fleet.shares[2] == 0
    fleet.costs[2] = usual
    for _ in range(20):
        fleet.step()
    assert abs(fleet.shares[2] - 30) <= 3


def test_a_spare_whose_slot_is_taken_by_unknown_hardware_does_not_stop_the_others_tables() -> None:
    fleet = Fleet([StepCost(0, 0.001), StepCost(0, 0.001), StepCost(0.2, 0.001)], 100, warm_spares=True)
    for slot in range(3):
        fleet.board.introduce(slot, Profile(hardware="x", device="cpu", cores=1.0, num_threads=1))
    for _ in range(30):
        fleet.step()
    assert fleet.shares[2] == 0
    fleet.board.introduce(2, Profile(hardware="y", device="cpu", cores=1.0, num_threads=1))
    fleet.costs[0] = StepCost(0, 0.004)
    for _ in range(20):
        fleet.step()
    assert fleet.shares[0] < 30


def test_no_worker_is_a_spare_unless_that_is_allowed() -> None:
    fleet = Fleet([StepCost(0.01, 0.001), StepCost(0.5, 0.001)], 200)
    for _ in range(30):
        fleet.step()
    assert fleet.shares == {0: 198, 1: 2}


def test_neighbouring_steps_that_are_slow_together_make_an_estimate_less_certain() -> None:
    def uncertainty(order: list[float]) -> float:
        model = StepTimeModel()
        for t in order:
            model.observe(100, t)
        return model.uncertainty

    times = [1.0, 1.02, 1.09, 1.1] * 4
    assert uncertainty(sorted(times)) > 1.3 * uncertainty(times)


def test_a_table_that_keeps_the_shares_promises_what_these_take() -> None:
    board = Scoreboard(HetConfig(alpha=1.0))
    board.global_batch_size = 100
    for _ in range(6):
        for slot, samples in ((0, 51), (1, 49)):
            board.observe(slot, samples, 0.001 * samples)
    table = board.better([0, 1], {0: 51, 1: 49})
    assert table is not None
    assert table.shares == {0: 51, 1: 49}
    assert table.predicted_step_s == pytest.approx(0.051)


def test_what_is_expected_after_twenty_noisy_steps_is_what_the_next_ones_take() -> None:
    """Steps wait for whoever is slowest, and the messages take 20 ms more: the mean of that is learnt, whatever tables
    come."""
    off = []
    for seed in range(20):
        costs, shares, rng = [StepCost(0.01, 0.001 / s) for s in (4, 2, 1)], [27, 27, 26], random.Random(seed)
        board = Scoreboard(HetConfig())
        board.global_batch_size = 80
        taken, expected = [], 0.0
        for step in range(120):
            own = [cost.step_s(b) * math.exp(rng.gauss(0, 0.1)) for cost, b in zip(costs, shares, strict=True)]
            cycle_s = max(own) + 0.02
            for slot, (b, seconds) in enumerate(zip(shares, own, strict=True)):
                board.observe(slot, b, seconds, cycle_s)
            table = board.better(range(3), dict(enumerate(shares)))
            shares = list(table.shares.values()) if table is not None else shares
            if step == 19:
                expected = board.expected_samples_per_s(dict(enumerate(shares))) or 0.0
            elif step > 19:
                taken.append(cycle_s)
        off.append(abs(expected / (80 / statistics.fmean(taken)) - 1))
    assert statistics.median(off) < 0.05
    assert board.expected_samples_per_s({0: 40, 9: 40}) is None


def test_after_a_loss_the_prediction_is_that_of_those_who_are_left() -> None:
    fleet = Fleet([StepCost(0, 0.001 / s) for s in (4, 2, 2)], 80)
    for _ in range(20):
        fleet.step()
    board = fleet.board
    assert fleet.shares == {0: 40, 1: 20, 2: 20}
    assert board.predicted_samples_per_s(fleet.shares) == pytest.approx(8000)
    assert board.predicted_samples_per_s({1: 40, 2: 40}) == pytest.approx(4000)
    assert board.predicted_samples_per_s({1: 40, 2: 40, 0: 0}) == pytest.approx(4000), "one that heals has no share yet"
    assert board.predicted_samples_per_s({1: 40, 7: 40}) is None
    assert board.predicted_samples_per_s({}) is None


def test_a_table_is_looked_for_once_in_a_round_of_observations(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []
    balanced = Scoreboard._balanced
    monkeypatch.setattr(Scoreboard, "_balanced", lambda *args, **more: judged.append(1) or balanced(*args, **more))
    board = Scoreboard(HetConfig())
    board.global_batch_size = 80
    for _ in range(10):
        for slot in range(8):
            board.observe(slot, 10, 1.0)
            assert board.better(range(8), dict.fromkeys(range(8), 10)) is None
    assert 7 <= len(judged) <= 10


def profile(gflops: float, step: StepCost | None = None, gbytes: float = 10.0, hardware: str = "x") -> Profile:
    return Profile(
        hardware=hardware,
        device="cpu",
        cores=1.0,
        num_threads=1,
        flops={"fp32": Measurement(gflops * 1e9, 0.01, 5)},
        memory_bandwidth=Measurement(gbytes * 1e9, 0.01, 5),
        step=step,
    )


def board_of(*profiles: Profile, total: int = 100, **settings: Any) -> Scoreboard:
    board = Scoreboard(HetConfig(**settings))
    board.global_batch_size = total
    for slot, known in enumerate(profiles):
        board.introduce(slot, known)
    return board


def test_a_run_starts_from_the_hardware_and_goes_on_from_its_own_steps() -> None:
    board = board_of(profile(90.0), profile(10.0))
    table = board.fitting([0, 1])
    assert table is not None
    assert table.shares == {0: 90, 1: 10}
    assert table.scores == pytest.approx({0: 1.8, 1: 0.2})
    for _ in range(5):
        board.observe(0, 89, 0.89)
        board.observe(1, 11, 0.11)
    table = board.better([0, 1], table.shares)
    assert table is not None
    assert table.shares == {0: 50, 1: 50}
    assert table.version == 2


def test_a_run_starts_from_the_step_times_of_earlier_runs_if_all_are_known() -> None:
    costs = [StepCost(0.01, 0.001), StepCost(0.01, 0.003)]
    table = board_of(profile(1, costs[0]), profile(1, costs[1])).fitting([0, 1])
    assert table is not None
    assert table.shares == dict(enumerate(balanced_shares(costs, 100)))
    assert table.predicted_step_s == pytest.approx(0.01 + 0.001 * table.shares[0])
    table = board_of(profile(1, costs[0]), profile(1)).fitting([0, 1])
    assert table is not None
    assert table.shares == {0: 50, 1: 50}


def test_a_policy_of_the_users_own_sets_scores_and_shares_and_they_stay() -> None:
    board = board_of(profile(1, gbytes=30), profile(1, gbytes=10), score_policy=lambda p: p.memory_bandwidth.median)
    table = board.fitting([0, 1])
    assert table is not None
    assert table.shares == {0: 75, 1: 25} or table.shares == {0: 74, 1: 26}
    for _ in range(9):
        board.observe(0, 75, 9.0)
        board.observe(1, 25, 0.1)
    assert board.better([0, 1], table.shares) is None
    board.introduce(2, profile(1, gbytes=40))
    table = board.fitting([0, 1, 2])
    assert table is not None
    assert table.scores == pytest.approx({0: 9 / 8, 1: 3 / 8, 2: 12 / 8})


def test_other_hardware_in_a_slot_is_scored_anew_and_the_same_is_not() -> None:
    board = board_of(profile(30), profile(10), score_policy="flops")
    table = board.fitting([0, 1])
    assert table is not None
    assert table.scores == pytest.approx({0: 1.5, 1: 0.5})
    board.introduce(1, profile(10))
    assert board.fitting([0, 1]) is None
    board.introduce(1, profile(90, hardware="y"))
    table = board.fitting([0, 1])
    assert table is not None
    assert table.scores == pytest.approx({0: 0.5, 1: 1.5})
    assert table.version == 2
    assert board.fitting([0, 1]) is None


@pytest.mark.parametrize("slot", [1, 2])
def test_who_comes_to_a_run_starts_with_the_share_that_its_hardware_is_worth(slot: int) -> None:
    board = board_of(profile(10), profile(10))
    board.fitting([0, 1])
    for _ in range(5):
        board.observe(0, 50, 0.5)
        board.observe(1, 50, 0.5)
    board.introduce(slot, profile(30, hardware="y"))
    table = board.fitting([0, slot])
    assert table is not None
    assert table.shares == {0: 25, slot: 75}
    assert table.scores == pytest.approx({0: 0.5, slot: 1.5})
    assert table.reason == f"worker {slot} has come"


def test_who_comes_to_a_run_with_a_kept_step_time_starts_from_that() -> None:
    board = board_of(profile(10), profile(10))
    board.fitting([0, 1])
    for _ in range(5):
        board.observe(0, 50, 0.5)
        board.observe(1, 50, 0.5)
    board.introduce(1, profile(10, StepCost(0, 0.04), hardware="y"))
    table = board.fitting([0, 1])
    assert table is not None
    assert table.shares == {0: 80, 1: 20}


def test_who_comes_and_is_not_known_at_all_leaves_the_table_as_it_is() -> None:
    board = board_of(profile(10), profile(10))
    table = board.fitting([0, 1])
    assert board.fitting([0, 1, 2]) is None
    board.introduce(2, profile(10))
    assert board.fitting([0, 1, 2]) is None, "nobody's steps are known to compare with"
    assert board.table is table


def test_a_policy_that_needs_what_was_not_measured_names_the_worker() -> None:
    board = board_of(
        profile(1), dataclasses.replace(profile(1), memory_bandwidth=None), score_policy="memory_bandwidth"
    )
    with pytest.raises(ConfigError, match="memory_bandwidth.*worker 1"):
        board.fitting([0, 1])
    with pytest.raises(ValueError, match="worker 0 is 0.0"):
        board_of(profile(1), profile(1), score_policy=lambda p: 0.0).fitting([0, 1])


def test_given_shares_and_no_alpha_need_no_first_table() -> None:
    assert board_of(profile(1), profile(9), shares=None).fitting([0, 1]) is None
    table = board_of(profile(1), profile(3), shares=None, alpha=1.0).fitting([0, 1])
    assert table is not None
    assert table.shares == {0: 50, 1: 50}
    assert table.gradient_weights[0] / table.gradient_weights[1] == pytest.approx(3.0)


def test_a_first_table_tells_of_the_shares_that_were_given() -> None:
    table = board_of(profile(1), profile(3), shares=(3, 1), alpha=1.0).fitting([0, 1])
    assert table is not None
    assert table.shares == {0: 75, 1: 25}


def test_a_policy_gives_scores_beside_given_shares_and_without_alpha() -> None:
    assert HetConfig(shares=(3, 1), score_policy="flops").follows_speeds, "else no hardware is measured"
    board = board_of(profile(1), profile(3), shares=(3, 1), score_policy="flops")
    table = board.fitting([0, 1])
    assert table is not None
    assert table.shares == {0: 75, 1: 25}
    assert table.gradient_weights == {0: 1.0, 1: 1.0}
    assert board.scores([0, 1]) == pytest.approx({0: 0.5, 1: 1.5})


def test_alpha_makes_a_table_where_shares_stay() -> None:
    fleet = Fleet([StepCost(0, 0.001 / s) for s in (4, 1)], 100, alpha=1.0, shares=None)
    for _ in range(5):
        fleet.step()
    table = fleet.board.table
    assert table is not None
    assert table.shares == {0: 50, 1: 50}
    assert table.gradient_weights[1] / table.gradient_weights[0] == pytest.approx(4.0)
    assert fleet.changes == 1


def test_gradient_weights_and_effective_batch_sizes_are_as_designed() -> None:
    speeds = {0: 4.0, 1: 2.0, 2: 1.0, 3: 1.0}
    assert gradient_weights(speeds, 0.0) == dict.fromkeys(speeds, 1.0)
    shares = [512, 256, 128, 128]
    for alpha, part in ((0.0, 1.0), (0.5, 0.92), (-0.5, 0.92), (1.0, 0.73)):
        weights = gradient_weights(speeds, alpha)
        assert effective_batch_size(shares, [weights[i] for i in range(4)]) / 1024 == pytest.approx(part, abs=0.02)
    assert sum(normalised_scores(speeds).values()) == pytest.approx(4.0)


@pytest.mark.parametrize("score", [0.0, -1.0, math.nan, math.inf])
def test_a_score_that_is_none_names_its_worker(score: float) -> None:
    with pytest.raises(ValueError, match="worker 7"):
        gradient_weights({1: 1.0, 7: score}, 0.5)
    with pytest.raises(ValueError, match="alpha=nan"):
        gradient_weights({1: 1.0}, math.nan)


def test_an_alpha_beyond_what_a_number_holds_is_refused_with_the_worker() -> None:
    with pytest.raises(ValueError, match=r"alpha=500.*worker 0"):
        gradient_weights({0: 0.1, 1: 1.9}, 500)
    with pytest.raises(ValueError, match=r"alpha=-2000.*worker 0"):
        gradient_weights({0: 0.1, 1: 1.9}, -2000)
    with pytest.raises(ValueError, match=r"alpha=1000 .*worker 0.*single precision"):
        gradient_weights({0: 0.77, 1: 1.23}, 1000)
    assert gradient_weights({0: 0.1, 1: 1.9}, 8) == pytest.approx({0: 1e8, 1: 1.9**-8})
    assert effective_batch_size([50, 50], [1e200, 1e-200]) == pytest.approx(50)


def test_the_effective_batch_size_of_a_literal_sum_counts_workers_means() -> None:
    assert effective_batch_size([80, 20], [1.0, 1.0]) == pytest.approx(100)
    assert effective_batch_size([80, 20], [1.0, 1.0], normalised=False) == pytest.approx(64)
    assert effective_batch_size([80, 0], [1.0, 1.0], normalised=False) == pytest.approx(80)


def test_speeds_together_and_alone_are_from_the_same_steps() -> None:
    """The last steps are a little faster, for each and so for all: they say nothing of how well the fleet does."""
    board = Scoreboard(HetConfig())
    board.global_batch_size = 200
    for step in range(40):
        step_s = 0.1 if step < 30 else 0.085
        for slot in range(2):
            board.observe(slot, 100, step_s, step_s)
    alone = [board.solo_samples_per_s(slot, 100) for slot in range(2)]
    assert board.samples_per_s == pytest.approx(sum(alone), rel=0.01)
