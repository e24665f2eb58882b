"""Eight workers, each with a codec of its own or all with low rank, and 200 buckets: nothing hangs, and replicas stay
identical.

Few steps, since they are long ones on two cores; HET_TEST_STEPS=500 makes them more.
"""

import os
from dataclasses import dataclass

import pytest
import torch
from labs import run
from torch import nn

from raytrain_het.allreduce import layout
from raytrain_het.codec_options import CODECS, used_together
from raytrain_het.config import HetConfig
from raytrain_het.testing.regression import Regression

EACH = [name for name in CODECS if not used_together(name)]
LAYERS = 100
STEPS = int(os.environ.get("HET_TEST_STEPS", "3"))


class Deep(nn.Module):
    """A hundred small layers: 200 parameters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(LAYERS))
        self.head = nn.Linear(6, 2, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / LAYERS
        return self.head(x)


@dataclass(frozen=True, kw_only=True)
class Many(Regression):
    """Half of its parameters are matrices, and compressed though they are small."""

    num_samples: int = 32 * STEPS
    global_batch_size: int = 32
    epochs: int = 1
    report: bool = False
    lr: float = 0.02

    def build(self):
        _, dataset = super().build()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Deep().to(self.dtype), dataset

    def __call__(self, directory):
        layout.SMALL = 1
        return super().__call__(directory)


@pytest.mark.parametrize("compression", [tuple(EACH), {"lowrank": {"rank": 2}}], ids=["one each", "lowrank"])
def test_eight_workers_and_200_buckets_do_not_hang_and_stay_identical(tmp_path, compression):
    config = HetConfig(bucket_mib=1e-6, compression=compression, shares=(1, 2, 1, 2, 1, 2, 1, 2), silence_s=5.0)
    task = Many()
    done = run(task, tmp_path, num_slots=8, config=config, timeout_s=240.0 + 8 * STEPS)
    parameters = [result["parameters"] for result in done.results.values()]
    assert len(parameters) == 8
    assert all(torch.equal(parameters[0], other) for other in parameters[1:])
    assert done.kinds("lost", "evicted") == []
    begun = torch.cat([p.detach().reshape(-1) for p in task.build()[0].parameters()])
    plain = task.plain()
    assert (parameters[0] - plain).norm() < 0.7 * (plain - begun).norm(), "it learns what dense training does, nearly"
