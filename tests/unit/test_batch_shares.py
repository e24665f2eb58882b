from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain_het.balance.batch_shares import StepCost, apportion, balanced_shares, proportional_shares

weight = st.one_of(st.just(0.0), st.floats(0, 1e300), st.integers(0, 100))
weight_lists = st.lists(weight, min_size=1, max_size=12).filter(any)


@given(st.integers(0, 10**6), weight_lists)
def test_batch_shares_sum_to_the_global_batch(total, weights):
    assert sum(apportion(total, weights)) == total


@given(st.integers(0, 10**6), weight_lists)
def test_a_batch_share_is_its_quota_rounded_down_or_up(total, weights):
    whole = sum(map(Fraction, weights))
    for count, w in zip(apportion(total, weights), weights, strict=True):
        assert abs(count - total * Fraction(w) / whole) < 1
        assert type(count) is int


@given(st.integers(0, 10**6), weight_lists)
def test_a_weight_of_zero_gets_no_sample(total, weights):
    assert all(count == 0 for count, w in zip(apportion(total, weights), weights, strict=True) if w == 0)


@given(st.integers(0, 10**6), weight_lists)
def test_a_larger_weight_never_gets_less(total, weights):
    counts = apportion(total, weights)
    by_weight = sorted(range(len(weights)), key=lambda i: (weights[i], -i))
    assert [counts[i] for i in by_weight] == sorted(counts)


@given(st.integers(0, 1000), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(-20, 20))
def test_only_the_proportions_of_the_weights_matter(total, weights, exponent):
    assert apportion(total, weights) == apportion(total, [w * 2.0**exponent for w in weights])


def test_ties_go_to_the_lower_index():
    assert apportion(512, [1, 1, 1]) == [171, 171, 170]
    assert apportion(2, [1.0] * 5) == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_bad_weight_is_named_with_its_index_and_value(bad):
    with pytest.raises(ValueError, match=rf"weights\[2\]={bad}"):
        apportion(8, [1.0, 0.0, bad])


@pytest.mark.parametrize("weights", [[], [0.0, 0.0]])
def test_weights_without_anything_to_go_by_are_refused(weights):
    with pytest.raises(ValueError, match="weights="):
        apportion(8, weights)


def test_a_negative_total_is_refused():
    with pytest.raises(ValueError, match="total=-1"):
        apportion(-1, [1.0])


cost = st.builds(StepCost, st.floats(0, 10), st.floats(1e-3, 10))
cost_lists = st.lists(cost, min_size=1, max_size=6)


@given(cost_lists, st.integers(0, 100), st.booleans())
def test_no_automatic_share_is_of_a_single_sample_where_the_batch_has_two_for_each(costs, more, spares):
    """Batch norm raises on one."""
    total = 2 * len(costs) + more
    shares = balanced_shares(costs, total, minimum=0 if spares else None)
    assert sum(shares) == total
    assert 1 not in shares
    assert spares or min(shares) >= 2


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.integers(0, 100))
def test_shares_in_proportion_have_two_samples_at_least_where_the_batch_has_them(weights, more):
    shares = proportional_shares(weights, 2 * len(weights) + more)
    assert sum(shares) == 2 * len(weights) + more
    assert min(shares) >= 2
    assert proportional_shares([90.0, 10.0, 0.1], 102) == [90, 10, 2]


def test_a_batch_without_two_samples_for_each_gives_one_to_some():
    assert sorted(balanced_shares([StepCost(0, 1)] * 3, 5)) == [1, 2, 2]
    assert sorted(proportional_shares([1, 1, 1], 4)) == [1, 1, 2]
    assert balanced_shares([StepCost(0, 1)] * 3, 1, minimum=0).count(1) == 1
    with pytest.raises(ValueError, match=r"costs\[1\]"):
        proportional_shares([1.0, 0.0], 4)


def test_a_share_of_two_for_a_slow_worker_is_all_it_gets():
    assert balanced_shares([StepCost(0, 0.001), StepCost(0, 0.2)], 100) == [98, 2]
    assert balanced_shares([StepCost(0, 0.001), StepCost(0, 0.08)], 100, minimum=0) == [100, 0]
