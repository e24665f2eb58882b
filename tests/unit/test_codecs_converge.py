"""Handwritten digits, four workers of unequal shares in one process: what codecs cost in training loss at equal steps.

Losses are compared with that of uncompressed gradients in the same process: they differ between processors, and from
seed to seed, by more than a codec costs. The rate is small enough for what a codec leaves out of a step to be made good
in the next ones: without that, losses are far off, which is tested too.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from collectives_fakes import Reduction, record_of
from sklearn.datasets import load_digits
from torch import nn

from raytrain_het.allreduce.codecs import RESIDUAL
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.layout import Layout

pytestmark = pytest.mark.usefixtures("one_thread", "shards_of_any_size")

SHARES = [10, 6, 3, 1]
BATCH, STEPS = 80, 200
DENSE = ("none",) * 4
MIXED = ("none", "int8", "topk(density=0.05)", "sign")


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images scaled to 0..1, and labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / 16, torch.from_numpy(labels)


@functools.cache
def loss_after_training(*codecs: str, forgets: bool = False, seed: int = 0) -> float:
    """Mean over all images.

    Args:
        codecs: of the workers.
        forgets: whether what codecs leave out of a step is dropped.
        seed: of the model and the samples.
    """
    torch.manual_seed(seed)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    named = list(model.named_parameters())
    layout = Layout(named, [], 20_000)
    by_name = dict(named)
    states = [ErrorFeedback(layout) for _ in SHARES]
    record = record_of([float(s) for s in SHARES], [1.0, 1.0, 2.0, 0.0], codecs=codecs)
    reduction = Reduction(record, layout, states)
    sizes = [BATCH * share // sum(SHARES) for share in SHARES]
    for step in range(STEPS):
        gradients: list[torch.Tensor | None] = []
        for part in torch.randint(0, len(x), (BATCH,)).split(sizes):
            model.zero_grad()
            F.cross_entropy(model(x[part]), y[part], reduction="sum").backward()
            gradients.append(torch.cat([by_name[s.name].grad.view(-1) for b in layout.buckets for s in b.segments]))  # type: ignore[union-attr]
        outs, _ = reduction.run(gradients, [float(size) for size in sizes], at=step)
        reduction.commit()
        for kept in (kept for state in states for kept in state._kept if forgets and RESIDUAL in kept):
            kept[RESIDUAL].zero_()
        for bucket, mean in zip(layout.buckets, outs[0], strict=True):
            for segment in bucket.segments:
                by_name[segment.name].grad = mean[segment.offset : segment.stop].view(segment.shape)
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def cost(*codecs: str, forgets: bool = False, seed: int = 0) -> float:
    """By how much the loss is larger than that of uncompressed gradients, as a part of it."""
    return loss_after_training(*codecs, forgets=forgets, seed=seed) / loss_after_training(*DENSE, seed=seed) - 1


def test_uncompressed_gradients_learn() -> None:
    assert loss_after_training(*DENSE) < 1.0, "a guess has 2.3"


# Ten seeds, six of them with AVX2 and four without vector instructions (ATEN_CPU_CAPABILITY). The worst: int8 0.0002,
# int4 0.002, sign 0.049, topk 0.056, with all_gather 0.040, randomk 0.017, lowrank 0.010, different codecs 0.025. The
# loss of uncompressed gradients was 0.44 to 0.50.
@pytest.mark.parametrize(
    ("codec", "bound"),
    [
        ("int8", 0.02),
        ("int4", 0.02),
        ("sign", 0.15),
        ("topk(density=0.05)", 0.20),
        ("topk(density=0.05, all_gather=true)", 0.15),
        ("randomk(density=0.5)", 0.10),
        ("lowrank", 0.05),
    ],
)
def test_the_loss_at_equal_steps_is_within_the_stated_part_of_dense(codec: str, bound: float) -> None:
    assert cost(*[codec] * 4) < bound


def test_a_fleet_of_different_codecs_learns_as_well() -> None:
    assert cost(*MIXED) < 0.1


@pytest.mark.parametrize("codec", ["sign", "topk(density=0.05)", "lowrank"])
def test_a_codec_that_forgets_what_it_has_left_out_would_be_seen(codec: str) -> None:
    # With the same ten seeds at least 1.9 (sign), 1.4 (topk) and 0.60 (lowrank).
    assert cost(*[codec] * 4, forgets=True) > 0.4
