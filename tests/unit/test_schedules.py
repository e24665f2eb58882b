"""Decay schedules against their closed forms, and what is said of those that make no sense."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.optim import SCHEDULES, schedule_of
from raytrain_het.worker.data.data_plan import DataPlan
from raytrain_het.worker.step.rates import Rates, give_back

E = 12.0
CLOSED_FORMS = {
    "constant": (lambda e: 1.0, "constant"),
    "step": (lambda e: 0.5 ** (e // 3), {"step": {"gamma": 0.5, "every_epochs": 3}}),
    "exponential": (lambda e: 0.9**e, {"exponential": {"gamma": 0.9}}),
    "inverse_time": (lambda e: 1 / (1 + 0.3 * e), {"inverse_time": {"k": 0.3}}),
    "plain 1/t": (lambda e: 1 / (1 + e), "inverse_time"),
    "cosine": (lambda e: 0.1 + 0.9 * (1 + math.cos(math.pi * e / E)) / 2, {"cosine": {"floor": 0.1}}),
    "linear": (lambda e: 1 - 0.8 * e / E, {"linear": {"floor": 0.2}}),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_schedule_is_its_closed_form(name: str) -> None:
    form, written = CLOSED_FORMS[name]
    for k in range(97):
        assert schedule_of(written).factor(k / 8, E) == pytest.approx(form(k / 8), rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warm_up_rises_in_a_line_and_the_decay_begins_after_it(name: str) -> None:
    plain, warm = schedule_of(name), schedule_of({name: {"warmup_epochs": 2, "warmup_from": 0.2}})
    assert [warm.factor(e, E) for e in (0, 0.5, 1, 1.5)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    for k in range(80):
        assert warm.factor(2 + k / 8, E) == plain.factor(k / 8, E - 2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_per_epoch_the_decay_goes_on_between_epochs_only(name: str) -> None:
    smooth, by_epoch = schedule_of(name), schedule_of({name: {"per_epoch": True}})
    for k in range(97):
        assert by_epoch.factor(k / 8, E) == smooth.factor(k // 8, E)
    warm = schedule_of({name: {"per_epoch": True, "warmup_epochs": 1.5}})
    assert [warm.factor(e, E) for e in (0.3, 1.2)] == pytest.approx([0.2, 0.8]), "a warm-up rises within its epochs"
    assert warm.factor(2.4, E) == warm.factor(1.5, E) == 1


def test_steps_of_a_part_of_an_epoch_are_not_late_by_rounding() -> None:
    tenths = schedule_of({"step": {"gamma": 0.5, "every_epochs": 0.1}})
    assert [tenths.factor(k / 10, 1) for k in range(10)] == [0.5**k for k in range(10)]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("cosin", "Write schedule='cosine'"),
        ({"cosine": {}, "step": {}}, "allowed is constant, step, exponential"),
        ({"step": {"gama": 0.1}}, "'step' has no option 'gama'.*Write 'gamma'"),
        ({"step": {"gamma": 1.5}}, "gamma=1.5 is not valid: allowed is a number above 0 and at most 1"),
        ({"step": {"every_epochs": 0}}, "every_epochs=0 is not valid"),
        ({"inverse_time": {"k": -1}}, "k=-1 is not valid"),
        ({"cosine": {"floor": True}}, "floor=True is not valid"),
        ({"linear": {"warmup_epochs": -1}}, "warmup_epochs=-1 is not valid"),
        ({"linear": {"warmup_from": 2}}, "warmup_from=2 is not valid"),
        ({"linear": {"per_epoch": 1}}, "per_epoch=1 is not valid"),
    ],
)
def test_what_is_no_schedule_is_told_with_what_is_allowed(written: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        HetConfig(schedule=written)  # type: ignore[arg-type]


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    plan = DataPlan(dataset_size=100, global_batch_size=10, shuffle=False, drop_last=False, seed=0)
    with pytest.raises(ConfigError, match="warmup_epochs=3 is not valid: allowed is less than the run's 3 epochs"):
        Rates(schedule_of({"cosine": {"warmup_epochs": 3}}), plan, 3)


def test_rates_of_all_groups_follow_progress_in_samples_whatever_they_were_before() -> None:
    plan = DataPlan(dataset_size=100, global_batch_size=30, shuffle=False, drop_last=False, seed=0)
    rates = Rates(schedule_of("linear"), plan, 4)
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    groups: list[dict[str, Any]] = [{"params": [first], "lr": 0.5}, {"params": [second], "lr": torch.tensor(2.0)}]
    optimizer = torch.optim.SGD(groups, foreach=False)  # A rate may be a tensor.
    for epoch, offset, factor in ((0, 0, 1.0), (1, 30, 1 - 1.3 / 4), (3, 90, 1 - 3.9 / 4), (1, 30, 1 - 1.3 / 4)):
        rates.set(optimizer, Cursor(epoch=epoch, offset=offset))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * factor, rel=1e-12)
        assert float(optimizer.param_groups[1]["lr"]) == pytest.approx(2.0 * factor)


def test_a_rate_that_is_one_tensor_for_all_groups_is_each_groups_own() -> None:
    plan = DataPlan(dataset_size=100, global_batch_size=50, shuffle=False, drop_last=False, seed=0)
    rate = torch.tensor(0.1)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=rate, foreach=False)
    rates = Rates(schedule_of({"cosine": {"warmup_epochs": 1}}), plan, 3)
    for epoch, expected in ((0, 0.0), (1, 0.1), (2, 0.05)):
        rates.set(optimizer, Cursor(epoch=epoch))
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([expected] * 2)
    assert float(rate) == pytest.approx(0.1), "the user's"
    give_back(optimizer)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.1] * 2)
    give_back(optimizer)


def test_an_optimizer_without_a_rate_is_refused() -> None:
    plan = DataPlan(dataset_size=100, global_batch_size=50, shuffle=False, drop_last=False, seed=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ConfigError, match="SGD has lr=None in parameter group 0"):
        Rates(schedule_of("linear"), plan, 3).set(optimizer, Cursor())
