"""The membership protocol under every order of events, and under random orders where there are too many.

``membership_model.py`` puts modelled members around the real state machine. A test enumerates all worlds that a
scenario's start can lead to: every order in which messages are read by either side, records are taken up, steps
are launched and committed, healing proceeds, and in which the scenario's deaths, refills, leaves, raises, torn
links, restarts of the hub and evictions come in between. Worlds that are equal are visited once.

In every world: record numbers grow and no two members act on different records with one number; a new base
undoes no commit of a live member; members that count hold histories of which one is the beginning of the other,
at most one step apart when a generation is formed; who is behind is so by one step; an unhealed member is
neither source nor base; no want goes untold and no healed member unseen; nobody who trains is sent away; no
generation follows a failure. In every last world (nothing goes on by itself) nobody waits: all were let go,
with "bye" if, and only if, they had finished or asked to leave.

``EXHAUSTIVE`` states how many worlds each scenario has at least, so that the enumeration can't shrink unseen;
together about 92,000 worlds. ``RANDOM`` scenarios (two or three members, several faults at once)
are walked along 150 seeded random paths each.
"""

from __future__ import annotations

import random

import pytest
from membership_model import Event, Scenario, Violation, World

EXHAUSTIVE = {
    "nothing happens": (Scenario(), 100),
    "an epoch in every step": (Scenario(epoch=1), 100),
    "the loop is left by break": (Scenario(epoch=0), 60),
    "a worker joins late": (Scenario(late=1), 1_000),
    "a worker joins late, the loop is left by break": (Scenario(late=1, epoch=0), 600),
    "a worker dies": (Scenario(deaths=1), 3_500),
    "a worker dies, the loop is left by break": (Scenario(deaths=1, epoch=0), 2_500),
    "the only worker dies and is refilled": (Scenario(slots=1, deaths=1, refills=1), 200),
    "a worker leaves": (Scenario(leaves=1), 1_500),
    "the last holder leaves while another joins": (Scenario(steps=1, epoch=1, late=1, leaves=1), 1_500),
    "a function raises": (Scenario(raises=1), 2_000),
    "a link breaks": (Scenario(broken_links=1), 7_000),
    "a function returns early": (Scenario(returns=1), 450),
    "a function returns early, the loop is left by break": (Scenario(returns=1, epoch=0), 350),
    "two functions return early, one after the other": (Scenario(slots=3, steps=1, epoch=0, returns=2), 7_000),
    "a function returns early while a worker joins": (Scenario(steps=1, epoch=1, returns=1, late=1), 400),
    "somebody is impatient at the end": (Scenario(impatient=1), 2_900),
    "somebody is impatient at the end, the loop is left by break": (Scenario(impatient=2, epoch=0), 12_800),
    "somebody is impatient while a worker joins": (Scenario(impatient=1, late=1, steps=1, epoch=0), 1_200),
    "a process stops, a slow one is taken for stopped": (Scenario(stops=1, hasty=1), 2_000),
    "the only worker dies twice": (Scenario(slots=1, deaths=2, refills=2), 5_500),
    "a worker dies while another joins": (Scenario(steps=1, epoch=1, deaths=1, late=1), 4_500),
    "a slow process is suspended and comes back": (Scenario(steps=1, epoch=1, impatient=1, hasty=1), 35_000),
    "a slow process is suspended while a worker joins": (
        Scenario(steps=1, epoch=1, late=1, impatient=1, hasty=1),
        35_000,
    ),
    "a connection is cut": (Scenario(cuts=1), 1_100),
    "a connection is cut while a worker joins": (Scenario(steps=1, epoch=1, late=1, cuts=1), 2_800),
    "a connection is cut while a worker leaves": (Scenario(steps=1, epoch=1, leaves=1, cuts=1), 18_000),
    "a connection is cut, and a worker dies": (Scenario(steps=1, epoch=1, cuts=1, deaths=1), 21_000),
    "a connection is cut, and a function returns early": (Scenario(steps=1, epoch=0, cuts=1, returns=1), 1_900),
    "the hub restarts": (Scenario(restarts=1), 2_200),
    "the hub restarts while a worker joins": (Scenario(steps=1, epoch=1, restarts=1, late=1), 8_000),
}

RANDOM = {
    "deaths and refills": Scenario(slots=3, steps=3, epoch=3, deaths=2, refills=2),
    "deaths and refills, the loop is left by break": Scenario(slots=2, steps=3, epoch=0, deaths=2, refills=2),
    "a joiner, a leave and a death": Scenario(slots=3, steps=3, epoch=2, late=1, leaves=1, deaths=1),
    "torn links and a death": Scenario(slots=3, steps=2, broken_links=2, deaths=1, refills=1),
    "restarts, a joiner and a death": Scenario(slots=3, steps=2, late=1, restarts=2, deaths=1),
    "restarts and torn links": Scenario(slots=2, steps=2, restarts=2, broken_links=1, leaves=1),
    "suspensions": Scenario(slots=3, steps=2, stops=1, hasty=2, refills=1),
    "suspensions, deaths and a joiner": Scenario(slots=3, steps=3, epoch=2, impatient=2, hasty=2, deaths=1, late=1),
    "suspensions and cut connections": Scenario(slots=3, steps=3, epoch=2, impatient=1, hasty=1, cuts=2, refills=1),
    "cut connections, restarts and a death": Scenario(slots=3, steps=2, cuts=2, restarts=1, deaths=1),
    "suspensions and restarts": Scenario(slots=3, steps=2, impatient=1, hasty=1, restarts=1, leaves=1),
    "early returns, a death and a joiner": Scenario(slots=3, steps=3, epoch=3, returns=2, deaths=1, refills=1, late=1),
    "early returns, impatience and a restart": Scenario(slots=2, steps=3, epoch=0, returns=1, impatient=2, restarts=1),
    "raises among restarts": Scenario(slots=3, steps=2, raises=1, restarts=1, late=1),
}
WALKS = 150


def explain(error: AssertionError, path: tuple[Event, ...]) -> AssertionError:
    return AssertionError(f"{error}\nafter\n" + "\n".join(f"    {event}" for event in path))


@pytest.mark.parametrize("name", EXHAUSTIVE)
def test_every_order_of_events_keeps_the_run_whole(name: str) -> None:
    scenario, at_least = EXHAUSTIVE[name]
    start = World(scenario)
    seen, waiting, ends = {start.key()}, [(start, ())], set()
    while waiting:
        world, path = waiting.pop()
        own, added = world.events()
        if not own:
            try:
                ends.add(world.check_end())
            except Violation as error:
                raise explain(error, path) from None
        for event in own + added:
            new = world.copy()
            try:
                new.happen(event)
            except AssertionError as error:
                raise explain(error, (*path, event)) from error
            if (key := new.key()) not in seen:
                seen.add(key)
                waiting.append((new, (*path, event)))
    assert len(seen) >= at_least, f"only {len(seen)} worlds: the enumeration has shrunk"
    assert "failed" in ends if scenario.raises else "ended" in ends


@pytest.mark.parametrize("name", RANDOM)
def test_random_orders_of_many_faults_keep_the_run_whole(name: str) -> None:
    ends = {walk(RANDOM[name], seed) for seed in range(WALKS)}
    assert ("failed" if RANDOM[name].raises else "ended") in ends


def walk(scenario: Scenario, seed: int) -> str:
    """One random path to its end; faults come at random times of it."""
    chance = random.Random(seed)
    world, path = World(scenario), ()
    haste = chance.choice([0.02, 0.1, 0.4])
    for _ in range(3000):
        own, added = world.events()
        if not own:
            break
        event = chance.choice(added if added and chance.random() < haste else own)
        path = (*path, event)
        try:
            world.happen(event)
        except AssertionError as error:
            raise explain(error, (("seed", seed), *path)) from error
    else:
        raise explain(AssertionError("it goes on for ever"), (("seed", seed), *path[-40:]))
    try:
        return world.check_end()
    except Violation as error:
        raise explain(error, (("seed", seed), *path)) from None
