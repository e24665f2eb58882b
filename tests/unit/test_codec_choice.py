"""The choice of codecs against what can be worked out by hand and by trying all of them."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain_het.balance.codec_choice import (
    ALIKE,
    INSIDE_BYTE_S,
    MIN_GAIN,
    CodecCost,
    Fleet,
    choose,
    choose_way,
    predict,
)

PLAIN = CodecCost(4.0, 0.0, 0.0, 0.0)
HALF = CodecCost(2.0, 1e-10, 1e-10, 0.002)
SMALL = CodecCost(0.5, 1e-9, 1e-9, 0.12)
TINY = CodecCost(0.03, 3e-9, 1e-9, 0.95)
COSTS = {"plain": PLAIN, "half": HALF, "small": SMALL, "tiny": TINY}
ALLOWED = list(COSTS)
MBIT = 8e-6


def fleet(*rates_mbit, num_elements=4_000_000, **others):
    size = len(rates_mbit)
    byte_s = [MBIT / rate for rate in rates_mbit]
    return Fleet(num_elements, [COSTS] * size, byte_s, [1.0] * size, **others)


def test_equal_links_carry_what_an_all_reduce_by_owners_sends():
    """``2 (N - 1) / N`` of the gradient, each way."""
    prediction = predict(fleet(100, 100, 100, 100, compute_s=0.1), ["plain"] * 4)
    assert prediction.num_bytes == pytest.approx([1.5 * 16e6] * 4)
    assert prediction.exchange_s == pytest.approx(1.5 * 16e6 * MBIT / 100)
    assert prediction.step_s == pytest.approx(0.1 + prediction.exchange_s)


def test_coding_takes_its_time_before_and_after():
    fast = fleet(1e6, 1e6)
    prediction = predict(fast, ["small", "small"])
    # All is encoded once; decoded are half of the other's, the other's means, and the own means.
    assert prediction.exchange_s == pytest.approx(4e6 * (1e-9 + (0.5 + 0.5 + 0.5) * 1e-9), rel=0.01)


def test_what_passes_beside_the_backward_pass_costs_nothing():
    hidden = fleet(100, 100, hidden=1.0, compute_s=2.0)
    assert predict(hidden, ["plain"] * 2).step_s == 2.0
    assert choose(hidden, ALLOWED, 1.0) == ("plain", "plain")
    little = fleet(100, 100, hidden=1.0, compute_s=0.2)
    assert predict(little, ["plain"] * 2).step_s == pytest.approx(1.28), "no more hides than there is to compute"
    assert choose(little, ALLOWED, 1.0) != ("plain", "plain"), "though what is used by now should be hidden whole"
    half = fleet(100, 100, hidden=0.5, compute_s=0.2)
    assert choose(half, ALLOWED, 1.0) == ("tiny", "tiny"), "whose messages are hidden by half too"


def test_a_single_worker_sends_nothing():
    assert predict(fleet(1), ["plain"]).exchange_s == 0.0
    assert choose(fleet(1), ALLOWED, 1.0) == ("plain",)


def test_fast_links_are_left_alone():
    assert choose(fleet(*[1e6] * 4, compute_s=0.02), ALLOWED, 1.0) == ("plain",) * 4


def test_slow_links_take_the_strongest_codec_that_may_lose_so_much():
    slow = fleet(20, 20, 20, 20, compute_s=0.02)
    assert choose(slow, ALLOWED, 1.0) == ("tiny",) * 4
    assert choose(slow, ALLOWED, 0.2) == ("small",) * 4
    assert choose(slow, ALLOWED, 0.0) == ("plain",) * 4


def test_one_slow_link_does_not_make_the_others_lose_more_than_helps_it():
    """What fast workers send of their own gradients goes to each other only, if the slow one owns nothing; the slow
    one receives their means."""
    mixed = fleet(2000, 2000, 2000, 10, compute_s=0.02)
    chosen = choose(mixed, ALLOWED, 1.0)
    single = min((predict(mixed, [word] * 4).step_s, word) for word in ALLOWED)
    assert predict(mixed, chosen).step_s <= (1 + ALIKE) ** 4 * single[0]
    assert chosen[3] == "tiny"


def test_a_gain_of_less_than_a_twentieth_is_not_worth_a_loss():
    nearly = fleet(100, 100, compute_s=0.0)
    long = fleet(100, 100, compute_s=20 * predict(nearly, ["plain"] * 2).exchange_s)
    assert choose(long, ALLOWED, 1.0) == ("plain", "plain")


@given(st.lists(st.floats(1, 1e5), min_size=2, max_size=3), st.floats(0, 1), st.floats(0.001, 1))
def test_no_other_choice_is_much_better(rates, error, compute_s):
    """Of all combinations. Workers change one after another, so a joint change of several may be missed, by little."""
    some = fleet(*rates, compute_s=compute_s)
    chosen = choose(some, ALLOWED, error)
    assert all(COSTS[word].error <= error or word == "plain" for word in chosen)
    within = [word for word in ALLOWED if COSTS[word].error <= error or word == "plain"]
    best_s = min(predict(some, each).step_s for each in itertools.product(within, repeat=len(rates)))
    assert predict(some, chosen).step_s <= (1 + MIN_GAIN) * (1 + ALIKE) ** len(rates) * best_s * (1 + 1e-9)


def test_what_all_use_together_stands_against_the_best_of_what_each_may_use():
    """One slow link: whoever is behind it alone would use it, if that could be."""
    thin = CodecCost(0.1, 1e-9, 0.0, 0.8)
    costs = COSTS | {"lowrank": thin}
    allowed = [*ALLOWED, "lowrank"]
    for rates in [(20, 1000, 1000, 1000), (20, 20, 20, 20), (1000,) * 4]:
        together = dataclasses.replace(fleet(*rates, compute_s=0.02), costs=[costs] * 4)
        chosen = choose(together, allowed, 0.9)
        assert len(set(chosen)) == 1 or "lowrank" not in chosen
        apart = choose(together, ALLOWED, 0.9)
        times = {c: predict(together, c).step_s for c in (chosen, apart, ("lowrank",) * 4)}
        assert times[chosen] <= 1.011 * min(times.values()) or set(chosen) == {"plain"}
    few = dataclasses.replace(fleet(20, 20), costs=[costs] * 2)
    assert choose(few, allowed, 0.9) == ("lowrank",) * 2
    assert "lowrank" not in choose(few, allowed, 0.5)


def test_what_stays_on_a_machine_takes_nothing_of_its_link():
    """Two of four workers on each: of what each sends, to three others, two thirds cross."""
    shared = fleet(100, 100, 100, 100, hosts="xxyy")
    apart = fleet(100, 100, 100, 100)
    assert predict(shared, ["plain"] * 4).exchange_s == pytest.approx(2 / 3 * predict(apart, ["plain"] * 4).exchange_s)
    alone = fleet(100, 100, 100, 100, hosts="xxxx")
    assert predict(alone, ["plain"] * 4).exchange_s == predict(apart, ["plain"] * 4).exchange_s


def test_by_machine_one_worker_has_the_link_to_itself_and_the_others_gradients_to_add():
    shared = fleet(100, 100, 100, 100, hosts="xxyy", compute_s=0.1)
    prediction = predict(shared, ["plain"] * 4, by_machine=True)
    across = 16e6 * MBIT / 200
    assert prediction.exchange_s == pytest.approx(across + 2 * 16e6 * INSIDE_BYTE_S)
    assert prediction.num_bytes == pytest.approx([16e6, 0.0, 16e6, 0.0])
    assert prediction.step_s == pytest.approx(0.1 + prediction.exchange_s)


def test_gradients_are_added_up_on_each_machine_where_links_are_slow():
    assert choose_way(fleet(10, 10, 10, 10, hosts="xxyy", compute_s=0.02), ALLOWED, 0.2) == (("small",) * 4, True)
    assert choose_way(fleet(*[1e5] * 4, hosts="xxyy", compute_s=0.02), ALLOWED, 0.2) == (("plain",) * 4, False)
    assert choose_way(fleet(10, 10, 10, 10, hosts="xxxx", compute_s=0.02), ALLOWED, 0.2)[1] is False
    mixed = dataclasses.replace(fleet(10, 10, 1000, 1000, hosts="xxyy"), speeds=[1.0, 2.0, 1.0, 1.0])
    assert choose_way(mixed, ALLOWED, 0.2)[1] is True


def test_by_machine_a_codec_is_judged_by_whoever_loses_most_there():
    """Which of a machine's workers encodes is not known here."""
    worse = COSTS | {"small": dataclasses.replace(SMALL, error=0.35)}
    for which in range(2):
        costs = [worse if k == which else COSTS for k in range(4)]
        some = dataclasses.replace(fleet(10, 10, 10, 10, hosts="xxyy", compute_s=0.02), costs=costs)
        chosen, by_machine = choose_way(some, ALLOWED, 0.2)
        assert by_machine and chosen[:2] == ("half", "half")
