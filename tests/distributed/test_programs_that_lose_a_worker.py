"""A lost worker changes no number of a program, whatever it does to its model between steps."""

from __future__ import annotations

import time

import pytest
import torch
from labs import run
from programs import (
    BATCH,
    CONFIG,
    EPOCHS,
    HooksOnParameters,
    Program,
    data,
    state,
)
from torch import nn
from torch.utils.data import DataLoader

import raytrain_het as het
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.regression import relative_error


class WithConstants(Program):
    """Buffers that nobody changes: sparse and expanded ones, which have no memory of their own for each element."""

    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 1)
            self.register_buffer("mask", torch.eye(6).to_sparse())
            self.register_buffer("gain", torch.ones(1).expand(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.sparse.mm(self.mask, x.T).T * self.gain)

    def build(self) -> nn.Module:
        return self.Net()


class Clamped(Program):
    """Weights are clamped, and shrunk behind torch's back, after each step; hooks count the steps."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model)
        optimizer.register_step_post_hook(lambda *_: model.steps.add_(1))
        return optimizer

    def build(self) -> nn.Module:
        model = super().build()
        model.register_buffer("steps", torch.zeros(()))
        return model

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        super().body(model, optimizer, x, y)
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.3, 0.3)
        model[2].weight.data.mul_(0.9)


class RestsWithZeros(Program):
    """A frozen layer goes on by its momentum, since its gradient is zeros and not None."""

    def epoch(self, model: nn.Module, epoch: int) -> None:
        model[0].requires_grad_(epoch < 1)

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)
        self.forward(model, x, y).backward()
        optimizer.step()


class RestsWithZerosOnWorkers(RestsWithZeros):
    """Steps wait for the next worker, so that it comes in the middle of an epoch."""

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        time.sleep(0.5 if het.num_participants() < 2 else 0.0)
        super().body(model, optimizer, x, y)


class StepsAtTheEpochsBeginning(Program):
    """A scheduler's step, and a draw that all workers make alike."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return optimizer

    def epoch(self, model: nn.Module, epoch: int) -> None:
        if epoch:
            self.scheduler.step()
        self.scheduler.optimizer.param_groups[0]["weight_decay"] = float(torch.rand(()))


class StepsAtTheEpochsBeginningOnWorkers(StepsAtTheEpochsBeginning):
    def __call__(self, directory: str) -> dict[str, torch.Tensor]:
        model = het.prepare_model(self.made())
        plain = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        optimizer = het.prepare_optimizer(plain)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        het.register_state("scheduler", self.scheduler)
        loader = het.prepare_data_loader(DataLoader(data()), global_batch_size=BATCH)
        for epoch in loader.epochs(EPOCHS):
            self.epoch(model, epoch)
            for x, y in loader:
                time.sleep(
                    0.5 if het.num_participants() < 2 else 0.0
                )  # The next worker comes in the middle of an epoch.
                self.body(model, optimizer, x, y)
        return state(model)


@pytest.mark.parametrize(
    "kind",
    [WithConstants, Clamped, HooksOnParameters, RestsWithZeros, StepsAtTheEpochsBeginning],
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize("point", ["backward", "updated"])
def test_a_lost_worker_changes_nothing(tmp_path, kind, point):
    faults = [Fault(slot=1, step=6, point=point, kind="kill")]
    on_workers = {
        StepsAtTheEpochsBeginning: StepsAtTheEpochsBeginningOnWorkers,
        RestsWithZeros: RestsWithZerosOnWorkers,
    }
    program = on_workers.get(kind, kind)()
    outcome = run(program, tmp_path, num_slots=2, config=CONFIG, faults=faults)
    assert outcome.kinds("lost")
    for name, value in kind().plain().items():
        for result in outcome.results.values():
            assert relative_error(result[name].to_dense(), value.to_dense()) < 1e-9, name
