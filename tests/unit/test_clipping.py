"""Clipping of the mean gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError
from raytrain_het.worker.step.clipping import Clipping


def model_with_gradients() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5), nn.Linear(5, 1))
    for p in list(model.parameters())[:-1]:  # One has none.
        p.grad = torch.randn_like(p)
    return model


@pytest.mark.parametrize("norm", [0.5, 5.0, 1e3])
def test_by_norm_it_is_as_torchs(norm: float) -> None:
    ours, theirs = model_with_gradients(), model_with_gradients()
    total = torch.nn.utils.clip_grad_norm_(theirs.parameters(), norm)
    assert Clipping(norm=norm).clip(ours.parameters()) == (total > norm)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_by_value_it_is_as_torchs_and_first_where_both_are_wanted() -> None:
    ours, theirs = model_with_gradients(), model_with_gradients()
    torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.1)
    before = copy.deepcopy(theirs)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
    assert Clipping(value=0.1, norm=0.3).clip(ours.parameters())
    assert not Clipping(value=0.2).clip(before.parameters())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [{}, {"norm": 0}, {"nrom": 1.0}, {"value": -1}, 3.0, {"norm": True}])
def test_what_cannot_be_clipped_to_is_refused(clip: object) -> None:
    with pytest.raises(ConfigError, match=r"clip=.* is not valid: allowed is None, or a 'norm' or 'value' above 0"):
        HetConfig(clip=clip)  # type: ignore[arg-type]


def test_limits_are_of_gradients_without_a_loss_scale() -> None:
    plain, scaled = model_with_gradients(), model_with_gradients()
    for p in scaled.parameters():
        if p.grad is not None:
            p.grad.mul_(1024)
    for clipping in (Clipping(value=0.5), Clipping(norm=2.0)):
        clipping.clip(plain.parameters())
        clipping.clip(scaled.parameters(), 1024.0)
        for mine, other in zip(plain.parameters(), scaled.parameters(), strict=True):
            if mine.grad is not None and other.grad is not None:
                assert torch.equal(mine.grad, other.grad / 1024)
