"""What is learnt of links from a run's own messages, and that owner shards follow where links hold steps up."""

from __future__ import annotations

import math
import random

import pytest

from raytrain_het.balance.paths import LEAST_S, NUM_LOOKS, WINDOW, PathRates, watched
from raytrain_het.balance.scoreboard import LINK_ROUNDS, Scoreboard, Table
from raytrain_het.config import HetConfig

SLOTS = range(4)


def looks(links_s: list[float], slot: int) -> dict[int, tuple[float, float]]:
    """A gradient in equal parts to all others, over paths that take as long as the slower one of their two links."""
    part = 1 / (len(links_s) - 1)
    return {peer: (part, max(links_s[slot], s)) for peer, s in enumerate(links_s) if peer != slot}


def told(paths: PathRates | Scoreboard, links_s: list[float], *, times: int = NUM_LOOKS) -> None:
    observe = paths.observe if isinstance(paths, PathRates) else paths.observe_paths
    for _ in range(times):
        for slot in range(len(links_s)):
            observe(slot, looks(links_s, slot))


def test_what_a_links_paths_carry_at_the_same_time_adds_up() -> None:
    paths = PathRates()
    told(paths, [2.0, 2.0, 2.0, 9.0])
    fast_s = 3 / (1 / 2 + 1 / 2 + 1 / 9)
    assert paths.links_s(SLOTS) == pytest.approx({0: fast_s, 1: fast_s, 2: fast_s, 3: 9.0})
    assert paths.links_s([0, 3]) == pytest.approx({0: 27.0, 3: 27.0})


def test_the_slower_direction_counts() -> None:
    paths = PathRates()
    for _ in range(NUM_LOOKS):
        paths.observe(0, {1: (1.0, 1.0)})
        paths.observe(1, {0: (0.5, 2.5)})
    assert paths.links_s([0, 1]) == pytest.approx({0: 5.0, 1: 5.0})


def test_nothing_is_known_before_all_paths_ends_are() -> None:
    paths = PathRates()
    for _ in range(NUM_LOOKS):
        paths.observe(0, {1: (1.0, 1.0)})
    assert paths.links_s([0, 1]) == {} and paths.links_s([0]) == {}
    told(paths, [1.0, 1.0, 1.0], times=NUM_LOOKS - 1)
    assert paths.links_s(range(3)) == {}


def test_a_burst_that_seems_to_take_no_time_counts_with_the_other_looks() -> None:
    paths = PathRates()
    told(paths, [0.5, 0.5], times=WINDOW)
    for slot in range(2):
        paths.observe(slot, {1 - slot: (1.0, 0.0)})
    assert paths.links_s([0, 1])[0] == pytest.approx(0.5 * (WINDOW - 1) / WINDOW)
    told(paths, [0.0, 0.0], times=WINDOW)
    assert paths.links_s([0, 1])[0] == pytest.approx(LEAST_S)


def test_who_has_no_share_sends_headers_only_and_its_link_is_judged_by_what_it_receives() -> None:
    paths = PathRates()
    for _ in range(NUM_LOOKS):
        for slot in range(3):
            paths.observe(slot, looks([0.1, 0.1, 0.1], slot) if slot < 2 else dict.fromkeys(range(2), (1e-4, 0.004)))
    assert paths.links_s(range(3)) == pytest.approx({0: 0.2, 1: 0.2, 2: 0.1}, rel=0.01)


def test_where_nothing_was_sent_nothing_is_known() -> None:
    paths = PathRates()
    for _ in range(NUM_LOOKS):
        paths.observe(0, {1: (0.0, 0.0)})
        paths.observe(1, {0: (0.0, 0.0)})
    assert paths.links_s([0, 1]) == {}


def test_who_comes_to_a_slot_has_a_link_of_its_own() -> None:
    paths = PathRates()
    told(paths, [1.0, 1.0, 9.0])
    paths.forget(2)
    assert paths.links_s(range(3)) == {} and paths.links_s([0, 1]).keys() == {0, 1}


class Fleet:
    """Four equal workers and a step of 100 ms besides the links' part of it."""

    def __init__(self, links_s: list[float], *, noise: float = 0.0) -> None:
        self.board, self.links_s, self.tables = Scoreboard(HetConfig()), links_s, list[Table]()
        self.board.global_batch_size = 400
        self.noise, self.random = noise, random.Random(0)

    def steps(self, count: int) -> None:
        for _ in range(count):
            for slot in SLOTS:
                seen = looks(self.links_s, slot)
                noise = {peer: math.exp(self.random.gauss(0, self.noise)) for peer in seen}
                self.board.observe_paths(slot, {peer: (g, s * noise[peer]) for peer, (g, s) in seen.items()})
            for slot in SLOTS:
                self.board.observe(slot, 100, 0.1, 0.1)
            table = self.board.better(SLOTS, dict.fromkeys(SLOTS, 100))
            if table is not None:
                self.tables.append(table)


def test_a_slow_link_that_a_step_waits_for_makes_a_table_once_and_shares_stay() -> None:
    fleet = Fleet([0.01, 0.01, 0.01, 0.2])
    fleet.steps(NUM_LOOKS + LINK_ROUNDS - 2)
    assert fleet.tables == []
    fleet.steps(30)
    (table,) = fleet.tables
    fast_s = 3 / (100 + 100 + 5)
    assert table.links_s == pytest.approx({0: fast_s, 1: fast_s, 2: fast_s, 3: 0.2})
    assert set(table.shares.values()) == {100}
    assert table.reason == "owner shards by links: the busiest one needs about 200 ms a step instead of 300"


@pytest.mark.parametrize("links_s", [[0.004, 0.004, 0.004, 0.008], [0.2, 0.2, 0.2, 0.2]])
def test_links_that_are_fast_or_alike_make_none(links_s: list[float]) -> None:
    fleet = Fleet(links_s)
    fleet.steps(30)
    assert fleet.tables == []


@pytest.mark.parametrize("links_s", [[0.05, 0.05, 0.05, 0.05], [0.05, 0.05, 0.05, 0.1]])
def test_noise_of_four_tenths_in_every_look_makes_few_tables(links_s: list[float]) -> None:
    fleet = Fleet(links_s, noise=0.4)
    fleet.steps(400)
    assert len(fleet.tables) <= 3


def test_links_that_are_fast_again_are_forgotten() -> None:
    fleet = Fleet([0.01, 0.01, 0.01, 0.2])
    fleet.steps(10)
    fleet.links_s = [0.001] * 4
    fleet.steps(30)
    assert [bool(table.links_s) for table in fleet.tables] == [True, False]
    assert fleet.tables[-1].reason == "owner shards by speed again: links are fast now"


def test_a_later_table_has_the_links_as_they_are_by_then() -> None:
    fleet = Fleet([0.01, 0.01, 0.01, 0.2])
    fleet.steps(10)
    told(fleet.board, [0.01, 0.01, 0.02, 0.2], times=WINDOW)
    for _ in range(20):
        for slot in SLOTS:
            fleet.board.observe(slot, 100, 0.3 if slot == 0 else 0.1, 0.3)
        table = fleet.board.better(SLOTS, dict.fromkeys(SLOTS, 100))
        if table is not None:
            break
    assert table is not None and "a step of" in table.reason
    assert table.links_s[2] == pytest.approx(3 / (50 + 50 + 5))


def test_what_stays_on_a_machine_says_nothing_of_its_link():
    paths = PathRates()
    paths.hosts = {0: "x", 1: "x", 2: "y"}
    for _ in range(NUM_LOOKS):
        paths.observe(0, {1: (0.5, 0.001), 2: (0.5, 1.0)}, 1000)
        paths.observe(1, {0: (0.5, 0.001), 2: (0.5, 1.0)}, 1000)
        paths.observe(2, {0: (0.5, 1.0), 1: (0.5, 1.0)}, 1000)
    assert paths.byte_s([0, 1, 2]) == pytest.approx({0: 0.002, 1: 0.002, 2: 0.001})
    paths.hosts = dict.fromkeys(range(3), "x")
    assert paths.byte_s([0, 1, 2])[0] < 0.0001


@pytest.mark.parametrize(("machines", "of_each"), [(2, 9), (2, 16), (2, 32), (3, 6), (4, 5), (16, 2), (32, 1)])
def test_links_are_known_of_large_fleets_whose_members_tell_of_some_paths_only(machines: int, of_each: int) -> None:
    paths, size = PathRates(), machines * of_each
    paths.hosts = {slot: f"machine {slot // of_each}" for slot in range(size)}
    for _ in range(NUM_LOOKS):
        for slot in range(size):
            paths.observe(slot, dict.fromkeys(watched(slot, size), (0.3, 0.01)))
    assert paths.links_s(range(size)).keys() == set(range(size))
