"""Optimizers by name in job files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.optimizer import make_optimizer, names_that_do_not_decay
from raytrain_het.jobs.table import load_job
from raytrain_het.optim import OPTIMIZERS, optimizer_of


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Linear(4, 2))


def update(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(times):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


SAME = {
    "sgd": ({"momentum": 0.8, "nesterov": True}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True)),
    "adagrad": ({"eps": 1e-6}, lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-6)),
    "rmsprop": ({"smoothing": 0.9}, lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9)),
    "adam": ({"beta1": 0.8}, lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.999))),
    "adamw": ({"weight_decay": 0.0}, lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_by_name_is_torchs_own(name: str) -> None:
    options, torchs = SAME[name]
    ours, theirs = net(), net()
    made = make_optimizer({"lr": 0.1, "optimizer": {name: options}}, ours)
    for a, b in zip(update(ours, made), update(theirs, torchs(theirs.parameters())), strict=True):
        assert torch.equal(a, b)


def test_biases_and_what_norms_learn_do_not_decay_unless_told() -> None:
    model = net()
    spared = {"0.bias", "1.weight", "1.bias", "2.bias", "3.weight", "3.bias", "4.bias"}
    assert names_that_do_not_decay(model) == spared
    named = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer({"lr": 1, "optimizer": {"sgd": {"weight_decay": 0.1}}}, model).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert {named[id(p)] for p in groups[1]["params"]} == spared
    (group,) = make_optimizer(
        {"lr": 1, "optimizer": {"sgd": {"weight_decay": 0.1, "decay_all": True}}}, model
    ).param_groups
    assert group["weight_decay"] == 0.1 and len(group["params"]) == len(named)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("sdg", r"optimizer='sdg' is not valid: allowed is sgd, .*Write optimizer='sgd'"),
        ({"sgd": {"momentun": 0.9}}, r"'sgd' has no option 'momentun'; .*Write 'momentum'"),
        (
            {"sgd": {"momentum": 1.0}},
            r"optimizer 'sgd': momentum=1.0 is not valid: allowed is a number from 0, below 1",
        ),
        ({"sgd": {"momentum": 0, "nesterov": True}}, r"nesterov=True .*momentum above 0"),
        ({"adam": {"eps": 0}}, r"optimizer 'adam': eps=0 .*above 0"),
        ({"adamw": {"weight_decay": -1}}, r"weight_decay=-1 .*a number from 0"),
        ({"sgd": {}, "adam": {}}, r"these are several"),
    ],
)
def test_an_optimizer_that_makes_no_sense_is_refused_with_what_to_write(written: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        optimizer_of(written)


@pytest.mark.parametrize("job", ["digits", "char_lm", "tabular"])
def test_every_job_takes_an_optimizer_by_name(job: str) -> None:
    loaded = load_job(
        f"experiments/jobs/{job}.yaml",
        ["optimizer.rmsprop.smoothing=0.9"] if job != "digits" else ["optimizer={rmsprop: {smoothing: 0.9}}"],
    )
    assert optimizer_of(loaded.train_loop_config()["optimizer"]).torch_options()["alpha"] == 0.9
    with pytest.raises(ConfigError, match="--set optimizer='adamm' is not valid: .*'adam'"):
        load_job(f"experiments/jobs/{job}.yaml", ["optimizer=adamm"])


def test_l1_needs_sgd_and_a_table_has_its_decay_in_l2() -> None:
    table = "experiments/jobs/tabular.yaml"
    with pytest.raises(ConfigError, match=r"l1=0.1 is not valid with optimizer='adam': .*--set optimizer=sgd"):
        load_job(table, ["l1=0.1", "optimizer=adam"])
    with pytest.raises(ConfigError, match=r"--set l2=0.3"):
        load_job(table, ["optimizer={adamw: {weight_decay: 0.3}}"])
    with pytest.raises(ConfigError, match=r"Leave weight_decay and decay_all out"):
        load_job(table, ["optimizer={sgd: {decay_all: true}}"])
