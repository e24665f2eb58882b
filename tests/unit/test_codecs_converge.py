"""Handwritten digits, four workers of unequal shares in one process: what codecs cost in accuracy at equal steps."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from collectives_fakes import Reduction, record_of
from sklearn.datasets import load_digits
from torch import nn

from raytrain_het.collectives.codec_states import CodecStates
from raytrain_het.collectives.layout import Layout

pytestmark = pytest.mark.usefixtures("one_thread")

SHARES = [10, 6, 3, 1]
BATCH, STEPS, HELD_OUT = 80, 250, 397


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images scaled to 0..1, and labels, in an order of chance."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(images).float()[order] / 16, torch.from_numpy(labels)[order]


@functools.cache
def accuracy(*codecs: str) -> float:
    """Percent of held-out images."""
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    named = list(model.named_parameters())
    layout = Layout(named, [], 20_000)
    by_name = dict(named)
    reduction = Reduction(
        record_of([float(s) for s in SHARES], [1.0, 1.0, 2.0, 0.0], codecs=codecs), layout,
        [CodecStates(layout) for _ in SHARES],
    )  # fmt: skip
    sizes = [BATCH * share // sum(SHARES) for share in SHARES]
    for step in range(STEPS):
        chosen = HELD_OUT + torch.randint(0, len(x) - HELD_OUT, (BATCH,))
        gradients: list[torch.Tensor | None] = []
        for part in chosen.split(sizes):
            model.zero_grad()
            F.cross_entropy(model(x[part]), y[part], reduction="sum").backward()
            gradients.append(torch.cat([by_name[s.name].grad.view(-1) for b in layout.buckets for s in b.segments]))  # type: ignore[union-attr]
        outs, _ = reduction.run(gradients, [float(size) for size in sizes], at=step)
        reduction.commit()
        for bucket, mean in zip(layout.buckets, outs[0], strict=True):
            for segment in bucket.segments:
                by_name[segment.name].grad = mean[segment.offset : segment.stop].view(segment.shape)
        optimizer.step()
    with torch.no_grad():
        return 100 * float((model(x[:HELD_OUT]).argmax(1) == y[:HELD_OUT]).float().mean())


@pytest.mark.parametrize(
    ("codec", "points"),
    [
        ("int8", 1.0),
        ("int4", 1.0),
        ("sign", 7.0),
        ("topk(density=0.05)", 3.0),
        ("topk(density=0.05, all_gather=true)", 2.0),
        ("randomk(density=0.5)", 3.0),
        ("lowrank", 1.5),
    ],
)
def test_accuracy_at_equal_steps_is_within_the_stated_points_of_dense(codec: str, points: float) -> None:
    assert accuracy(*["none"] * 4) >= 95
    assert accuracy(*[codec] * 4) >= accuracy(*["none"] * 4) - points


def test_a_fleet_of_different_codecs_learns_as_well() -> None:
    assert accuracy("none", "int8", "topk(density=0.05)", "sign") >= accuracy(*["none"] * 4) - 1.0
