"""Slow members own little or nothing of the reduction, and nobody owns much more than an equal part."""

from __future__ import annotations

import itertools

import pytest

from raytrain_het.balance.owner_shards import LINK_SLACK, busiest_link_s, link_parts, owner_parts


@pytest.mark.parametrize(
    ("speeds", "parts"),
    [
        ([1, 1, 1, 1], [0.25] * 4),
        ([2, 1, 0.5, 0.5], [0.5, 0.5, 0, 0]),
        ([8, 1], [1, 0]),
        ([0, 0, 1, 1], [0, 0, 0.5, 0.5]),
        ([3], [1]),
        ([0, 0], [0, 0]),
    ],
)
def test_parts_go_with_speed(speeds: list[float], parts: list[float]) -> None:
    assert owner_parts(speeds) == pytest.approx(parts)


@pytest.mark.parametrize("speeds", [[30, 1, 1, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1], [1.1, 1.0, 0.9], [100, 50, 1, 1]])
def test_all_is_owned_and_nobody_owns_more_than_twice_an_equal_part(speeds: list[float]) -> None:
    parts = owner_parts(speeds)
    assert sum(parts) == pytest.approx(1)
    assert max(parts) <= 2 / len(speeds) + 1e-9
    assert parts == sorted(parts, reverse=True)


LINKS = [[1, 1, 1, 10], [1, 1, 1], [3, 1, 1, 1, 2], [5, 5, 1, 1], [1, 4, 9]]


@pytest.mark.parametrize("links_s", LINKS)
def test_no_other_parts_keep_the_busiest_link_shorter(links_s: list[float]) -> None:
    grid = 20
    best = min(
        busiest_link_s([n / grid for n in cut], links_s)
        for cut in itertools.product(range(grid + 1), repeat=len(links_s))
        if sum(cut) == grid
    )
    parts = link_parts(links_s)
    assert sum(parts) == pytest.approx(1) and min(parts) >= 0
    assert busiest_link_s(parts, links_s) <= best * (1 + 1e-9)


@pytest.mark.parametrize("links_s", LINKS)
@pytest.mark.parametrize("speeds", [[1, 1, 1, 1, 1], [1, 2, 3, 4, 5], [5, 1, 1, 1, 1], [1, 0.1, 0.1, 0.1, 9]])
def test_slow_links_have_the_last_word(links_s: list[float], speeds: list[float]) -> None:
    speeds = speeds[: len(links_s)]
    parts = owner_parts(speeds, links_s)
    assert sum(parts) == pytest.approx(1) and min(parts) >= 0
    # What is cut off as too little to be worth a wait goes to others, a little beyond their limits.
    assert busiest_link_s(parts, links_s) <= 1.05 * LINK_SLACK * busiest_link_s(link_parts(links_s), links_s)


def test_a_member_behind_a_slow_link_owns_little_and_the_others_the_rest() -> None:
    assert owner_parts([1, 1, 1, 1], [0.01, 0.01, 0.01, 1.0]) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert owner_parts([1, 1, 1], [0.01, 0.01, 1.0]) == pytest.approx([0.45, 0.45, LINK_SLACK - 1])


def test_a_slow_member_does_not_come_to_own_for_the_sake_of_links_that_are_alike() -> None:
    assert owner_parts([1, 1, 1, 0.1], [1, 1, 1, 1]) == pytest.approx(owner_parts([1, 1, 1, 0.1]))


def test_links_that_a_step_has_time_for_change_nothing() -> None:
    assert owner_parts([4, 3, 2, 1], [1, 1, 1, 2], unhurried_s=10) == owner_parts([4, 3, 2, 1])


def test_of_two_members_links_change_nothing() -> None:
    assert owner_parts([2, 1], [1, 100]) == owner_parts([2, 1])


def test_who_owns_nothing_since_it_is_not_healed_owns_nothing_with_links_too() -> None:
    assert owner_parts([0, 1, 1, 1], [1, 1, 1, 1])[0] == 0
