"""Predictions against brute force, and advice on fleets whose answer is known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain_het.balance.batch_shares import StepCost
from raytrain_het.probing.prediction import ENOUGH, Machine, advice, chance, communication_s, messages_s, predict

MACHINES = st.lists(
    st.builds(
        lambda c, k, latency, bandwidth: Machine(cost=StepCost(c, k), latency_s=latency, bandwidth=bandwidth),
        st.floats(0, 0.1),
        st.floats(1e-3, 0.1),
        st.floats(0, 0.01),
        st.floats(1e5, 1e9),
    ),
    min_size=1,
    max_size=4,
)


def machine(c: float, k: float, latency_s: float = 0.0, bandwidth: float = math.inf, **more: float) -> Machine:
    return Machine(cost=StepCost(c, k), latency_s=latency_s, bandwidth=bandwidth, **more)


def all_shares(count: int, total: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (total,)
        return
    for first in range(1, total - count + 2):
        for rest in all_shares(count - 1, total - first):
            yield (first, *rest)


def brute_force_s(machines: list[Machine], batch: int, num_bytes: float) -> float:
    """The least step time over all ways to share the batch, each message followed by hand."""
    n = len(machines)
    slowest = min(
        max(m.cost.fixed_s + m.cost.per_sample_s * b for m, b in zip(machines, shares, strict=True))
        for shares in all_shares(n, batch)
        if min(shares) >= (2 if batch >= 2 * n else 1)
    )
    exchange = 0.0
    if n > 1:
        exchange = max(sum(num_bytes / n / m.bandwidth for _ in range(n - 1)) for m in machines)
        exchange += max(m.latency_s for m in machines)
    return slowest + 2 * exchange


@given(MACHINES, st.integers(4, 14), st.floats(0, 1e7))
def test_a_prediction_is_the_best_of_all_shares(machines: list[Machine], batch: int, num_bytes: float) -> None:
    found = predict(machines, global_batch_size=batch, gradient_bytes=num_bytes)
    best = brute_force_s(machines, batch, num_bytes)
    assert sum(found.shares) == batch
    # Shares are within one sample's time of the best.
    assert best * (1 - 1e-9) <= found.step_s <= best + max(m.cost.per_sample_s for m in machines)
    assert found.samples_per_s == pytest.approx(batch / found.step_s)


@given(MACHINES, st.integers(4, 14), st.floats(0, 1e7))
def test_a_gain_is_throughput_with_over_throughput_without(
    machines: list[Machine], batch: int, num_bytes: float
) -> None:
    given = advice(machines, global_batch_size=batch, gradient_bytes=num_bytes)
    whole = predict(machines, global_batch_size=batch, gradient_bytes=num_bytes).samples_per_s
    for i, gain in enumerate(given.gains):
        rest = machines[:i] + machines[i + 1 :]
        without = predict(rest, global_batch_size=batch, gradient_bytes=num_bytes).samples_per_s if rest else 0.0
        assert gain == (pytest.approx(whole / without) if without else math.inf)
    assert given.without_them.samples_per_s >= whole * (1 - 1e-9)
    assert 0 < given.fraction_of_aggregate <= 1 + 1e-9


def test_communication_by_the_formula() -> None:
    a, b = machine(0, 1, 0.001, 1e8), machine(0, 1, 0.003, 5e7)
    assert communication_s([a], 4e6) == 0
    assert communication_s([a, b], 4e6) == pytest.approx(4e6 / 5e7 + 2 * 0.003)
    assert communication_s([a, a, a, a], 4e6) == pytest.approx(1.5 * 4e6 / 1e8 + 2 * 0.001)


@pytest.mark.parametrize("spreads", [[0.1] * 2, [0.1] * 4, [0.05] * 16, [0.1, 0.1, 0.05, 0.05]])
def test_chance_is_what_the_slowest_of_random_times_exceeds_the_mean_by(spreads: list[float]) -> None:
    random = Random(0)
    largest = statistics.fmean(max(random.gauss(1, s) for s in spreads) for _ in range(20_000))
    assert chance(spreads) == pytest.approx(largest - 1, rel=0.06)
    assert chance([0.3]) == 0


def test_messages_take_time_of_small_machines_and_chance_of_all_of_them() -> None:
    small, large = machine(0, 0.01, cores=0.2, spread=0.1), machine(0, 0.0025, cores=0.8, spread=0.1)
    assert messages_s(small, 1e6) == pytest.approx((1.2e-3 + 1.5e-3) / 0.2)
    found = predict([small, large], global_batch_size=100, gradient_bytes=1e6)
    own_s = [small.cost.step_s(found.shares[0]) + 0.0135, large.cost.step_s(found.shares[1]) + 0.003375]
    assert found.shares == (19, 81)
    assert found.compute_s == pytest.approx(max(own_s))
    assert found.chance_s == pytest.approx(max(own_s) * chance([0.1, 0.1]))
    assert found.step_s == pytest.approx(found.compute_s + found.chance_s)
    alone = predict([small], global_batch_size=100, gradient_bytes=1e6)
    assert alone.step_s == pytest.approx(1.0)


def test_equal_machines_without_communication_double_the_throughput() -> None:
    given = advice([machine(0, 0.001)] * 2, global_batch_size=100, gradient_bytes=1e6)
    assert given.prediction.shares == (50, 50)
    assert given.gains == (pytest.approx(2), pytest.approx(2))
    assert given.costs_more == () and given.fraction_of_aggregate == pytest.approx(1)


def test_a_machine_that_holds_all_others_up_is_named_and_no_other() -> None:
    # One sample takes it longer than the others need for the whole batch; beside it no other seems to matter.
    fleet = [machine(0, 0.001), machine(2.0, 0.5), machine(0, 0.001)]
    given = advice(fleet, global_batch_size=100, gradient_bytes=0)
    assert given.gains[0] == given.gains[2] == 1
    assert given.costs_more == (1,)
    assert given.without_them.shares == (50, 50)


def test_a_machine_behind_a_slow_link_is_named() -> None:
    fleet = [machine(0, 0.001, bandwidth=1e9), machine(0, 0.001, bandwidth=1e9), machine(0, 0.001, bandwidth=1e6)]
    given = advice(fleet, global_batch_size=100, gradient_bytes=1e6)
    assert given.costs_more == (2,)
    assert given.without_them.shares == (50, 50)


def test_the_only_machine_is_never_left_out() -> None:
    given = advice([machine(1, 1)], global_batch_size=1, gradient_bytes=0)
    assert given.gains == (math.inf,) and given.costs_more == ()


def test_larger_batches_spread_what_is_fixed_up_to_the_bound() -> None:
    fleet = [machine(0.01, 0.001), machine(0.02, 0.002)]
    given = advice(fleet, global_batch_size=100, gradient_bytes=0, max_batch_size=3000)
    speeds = {b: predict(fleet, global_batch_size=b, gradient_bytes=0).samples_per_s for b in (100, 1024, 2048, 3000)}
    assert given.best_batch_size == 3000 and given.best_samples_per_s == pytest.approx(speeds[3000])
    assert predict(fleet, global_batch_size=given.enough_batch_size, gradient_bytes=0).samples_per_s >= (
        ENOUGH * given.best_samples_per_s
    )
    assert given.enough_batch_size < 3000


def test_a_batch_of_less_than_a_sample_each_is_refused() -> None:
    with pytest.raises(ValueError, match="total=1"):
        predict([machine(0, 1)] * 2, global_batch_size=1, gradient_bytes=0)
