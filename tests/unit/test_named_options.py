"""Kinds with options: each option says itself what it may be."""

from __future__ import annotations

import dataclasses

import pytest

from raytrain_het.errors import ConfigError
from raytrain_het.named_options import Allowed, NamedOptions, choose, name_and_options
from raytrain_het.optim import OPTIMIZERS, SCHEDULES
from raytrain_het.score_policies import SCORE_POLICIES
from raytrain_het.sweeps.search import SCHEDULERS, SEARCHES

TABLES = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "scheduler": SCHEDULERS,
    "score_policy": SCORE_POLICIES,
    "search": SEARCHES,
}
KINDS = [kind for table in TABLES.values() for kind in table.values()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.field}-{kind.name}")
def test_every_option_declares_its_values_and_refuses_others(kind: type[NamedOptions]) -> None:
    default = kind()
    for option in dataclasses.fields(kind):
        allowed: Allowed = option.metadata[Allowed]
        assert allowed.holds(getattr(default, option.name))
        with pytest.raises(ConfigError, match=f"{option.name}=.* is not valid: allowed is {allowed.words}"):
            kind(**{option.name: "other"})


@pytest.mark.parametrize("field", TABLES)
def test_the_example_in_messages_is_one_of_the_table(field: str) -> None:
    table = TABLES[field]
    for kind in table.values():
        assert choose(table, eval(kind.example)).field == field


@pytest.mark.parametrize(
    ("written", "name", "options"),
    [
        ("step", "step", {}),
        ({"step": None}, "step", {}),
        ({"step": {"gamma": 1}}, "step", {"gamma": 1}),
        ({"step": 3}, "step", None),
        ({1: {}}, None, {}),
        ({}, None, {}),
        ({"step": {}, "linear": {}}, None, {}),
        (["step"], None, {}),
        (None, None, {}),
    ],
)
def test_a_name_with_options_is_taken_apart_whatever_it_is(
    written: object, name: str | None, options: dict | None
) -> None:
    assert name_and_options(written) == (name, options)


@pytest.mark.parametrize("written", [None, 3, {}, ["step"], {"step": 3}, {"step": {}, "linear": {}}])
def test_what_is_no_kind_is_refused_with_all_kinds(written: object) -> None:
    with pytest.raises(ConfigError, match="schedule=.*allowed is constant, step, exponential"):
        choose(SCHEDULES, written)  # type: ignore[arg-type]
