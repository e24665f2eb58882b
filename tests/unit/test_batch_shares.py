from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain_het.allocation.batch_shares import apportion

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
