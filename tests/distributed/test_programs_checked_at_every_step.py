"""With ``check="every_step"`` the first steps are compared with one process, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from labs import run
from programs import (
    BuffersByHand,
    ManyPasses,
    Program,
    Sum,
)
from torch import nn

from raytrain_het.config import HetConfig
from raytrain_het.testing.processes import WorkersFailedError
from raytrain_het.testing.regression import relative_error


class TargetsNormalisedByNumpy(Program):
    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        numbers = y.numpy()
        return F.mse_loss(model(x), torch.from_numpy((numbers - numbers.mean()) / (numbers.std() + 1e-8)))


EVERY_STEP = HetConfig(shares=(3, 1), bucket_mib=0.0002, silence_s=10, check="every_step")


@pytest.mark.parametrize("kind", [BuffersByHand, ManyPasses, Sum], ids=lambda kind: kind.__name__)
def test_with_check_the_first_steps_agree_with_one_process_and_nothing_else_changes(tmp_path, kind):
    outcome = run(kind(), tmp_path, num_slots=2, config=EVERY_STEP)
    compared = outcome.kinds("compared")
    assert [event["step"] for event in compared] == [0, 1, 2] and all(event["error"] < 1e-9 for event in compared)
    for name, value in kind().plain().items():
        assert relative_error(outcome.results[0][name], value) < 1e-9, name


def test_with_check_a_loss_that_is_no_mean_is_found_in_the_first_step(tmp_path):
    with pytest.raises(
        WorkersFailedError, match="(?s)step 1: the workers' mean gradient is .* off .*The loss is no mean"
    ):
        run(TargetsNormalisedByNumpy(), tmp_path, num_slots=2, config=EVERY_STEP)


class CountsInABuffer(Program):
    """A buffer that holds a sum over samples, as the sizes of clusters are."""

    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 1)
            self.register_buffer("sizes", torch.zeros(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.sizes.mul_(0.9).add_((x.detach() > 0).double().sum(0), alpha=0.1)
            return super().forward(x)

    def build(self) -> nn.Module:
        return self.Net()


def test_with_check_a_buffer_that_is_no_mean_over_samples_is_found_in_the_first_step(tmp_path):
    with pytest.raises(WorkersFailedError, match="(?s)step 1: buffer 'sizes' is .* off .*holds a sum"):
        run(CountsInABuffer(), tmp_path, num_slots=2, config=EVERY_STEP)
