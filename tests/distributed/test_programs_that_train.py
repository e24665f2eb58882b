"""Programs as people bring them train as one process with the whole batch would. Two workers, shares 3:1, fp64."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from labs import run
from programs import (
    BATCH,
    CONFIG,
    EPOCHS,
    BuffersByHand,
    HooksOnParameters,
    ManyPasses,
    Program,
    StepAlongTheGradientOfAMean,
    Sum,
    data,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset

import raytrain_het as het
from raytrain_het.testing.regression import relative_error


class ReentrantAtTheLoss(Program):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 8)
            self.body = nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.body, self.stem(x), use_reentrant=True)

    def build(self) -> nn.Module:
        return self.Net()


class SharedBlockCheckpointedTwice(Program):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for _ in range(2):
                x = checkpoint(lambda h: torch.tanh(self.block(h)), x, use_reentrant=True)
            return self.head(x) + self.block.weight.mean()

    def build(self) -> nn.Module:
        return self.Net()


class HooksOfManyKinds(Program):
    """One writes to the parameter, one returns what it keeps, one is for several parameters, one removes another."""

    def build(self) -> nn.Module:
        model = super().build()
        kept = torch.zeros(8, 6, dtype=torch.float64)
        model[0].weight.register_hook(lambda g: kept.mul_(0.9).add_(g))
        model[0].bias.register_post_accumulate_grad_hook(self.moved)
        model[2].weight.register_hook(lambda g: g + 0.01 * model[2].weight)
        first = model[0].bias.register_hook(lambda g: 0.0 * g)
        model[2].weight.register_post_accumulate_grad_hook(lambda _: first.remove())
        self.norms: list[float] = []
        both = [model[0].weight, model[2].weight]
        torch.autograd.graph.register_multi_grad_hook(both, lambda gs: self.norms.extend(float(g.norm()) for g in gs))
        return model

    @staticmethod
    def moved(p: torch.Tensor) -> None:
        assert p.grad is not None
        p.add_(p.grad.sign(), alpha=-0.01)

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        self.forward(model, x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with torch.no_grad():
            model[2].bias.grad.add_(sum(self.norms[-2:]))
        optimizer.step()


class OldZeroing(Program):
    """As torch's optimizers zeroed gradients once; a layer is frozen between its forward and its backward pass."""

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        loss = self.forward(model, x, y)
        model[0].bias.requires_grad = False
        loss.backward()
        model[0].bias.requires_grad = True
        optimizer.step()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.detach_()
                p.grad.zero_()


class PassesOfAnotherThread(Program):
    """A thread of the program's own trains nothing, and differentiates another model all the time."""

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        other = nn.Linear(1, 1).double()
        with ThreadPoolExecutor(1) as pool:
            passes = [pool.submit(lambda: other(y.detach()).mean().backward()) for _ in range(20)]
            super().body(model, optimizer, x, y)
            for one in passes:
                one.result()


class HeadOnly(Program):
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model[2].parameters(), lr=0.02)

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        self.forward(model, x, y).backward()
        # The backbone's gradients add up, as in plain torch, and count here.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()


class ZeroedInPlace(Program):
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=0.02)

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        if torch.rand(()) < 0:
            raise AssertionError
        self.forward(model, x, y).backward()
        optimizer.step()
        for p in model.parameters():
            p.grad.zero_()


class KeepsTheLastGradient(Program):
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self.kept = [torch.zeros_like(p) for p in model.parameters()]
        return super().optimizer(model)

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)
        self.forward(model, x, y).backward()
        new = [p.grad for p in model.parameters()]
        optimizer.zero_grad()
        for p, g, old in zip(model.parameters(), new, self.kept, strict=True):
            p.grad = g + 0.5 * old
        self.kept = new
        optimizer.step()


class Freezing(Program):
    def epoch(self, model: nn.Module, epoch: int) -> None:
        model[0].requires_grad_(epoch != 1)


class ChannelsLastFused(Program):
    def build(self) -> nn.Module:
        model = nn.Sequential(nn.Unflatten(1, (3, 2, 1)), nn.Conv2d(3, 4, (2, 1)), nn.Flatten(), nn.Linear(4, 1))
        return model.double().to(memory_format=torch.channels_last)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        model[1].weight.data = model[1].weight.data.to(memory_format=torch.channels_last)
        return torch.optim.Adam(model.parameters(), lr=0.02, fused=True)


class MeanOfSome(Program):
    """Of the samples whose first number is positive."""

    def loader_options(self) -> dict[str, Any]:
        return {"weight": lambda batch: (batch[0][:, 0] > 0).sum()}

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mask = x[:, :1] > 0
        return ((model(x) - y).square() * mask).sum() / mask.sum().clamp(min=1)


class StepAlongTheSignOfTheGradient(StepAlongTheGradientOfAMean):
    def size(self, gradient: torch.Tensor) -> torch.Tensor:
        return 0.5 * gradient.sign()


PROGRAMS = [
    ReentrantAtTheLoss,
    SharedBlockCheckpointedTwice,
    PassesOfAnotherThread,
    HeadOnly,
    HooksOnParameters,
    HooksOfManyKinds,
    ZeroedInPlace,
    OldZeroing,
    KeepsTheLastGradient,
    Freezing,
    BuffersByHand,
    ChannelsLastFused,
    Sum,
    MeanOfSome,
    ManyPasses,
    StepAlongTheSignOfTheGradient,
]


@pytest.mark.parametrize("kind", PROGRAMS, ids=lambda kind: kind.__name__)
def test_it_trains_as_one_process_does(tmp_path, kind: Callable[[], Program]):
    program = kind()
    outcome = run(program, tmp_path, num_slots=2, config=CONFIG)
    expected = copy.deepcopy(program).plain()
    for name, value in expected.items():
        assert relative_error(outcome.results[0][name], value) < 1e-9, name
        assert torch.equal(outcome.results[0][name], outcome.results[1][name]), name


class ReportsInTheBody(Program):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = super().forward(model, x, y)
        het.report({"loss": loss.item()})
        return loss


def test_a_report_in_the_middle_of_a_step_saves_what_all_have(tmp_path):
    outcome = run(ReportsInTheBody(), tmp_path, num_slots=2, config=CONFIG)
    assert len(outcome.lab.reports) == EPOCHS * 4 and all(r["checkpoint"] for r in outcome.lab.reports)


def a_sum_of_its_own(directory: str) -> list[str]:
    """A report of a number that the body has added up; what was warned of meanwhile."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("raytrain_het").addHandler(handler)
    model = het.prepare_model(nn.Linear(6, 1).double())
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.01))
    loader = het.prepare_data_loader(DataLoader(Subset(data(), range(9))), global_batch_size=BATCH)
    for _ in loader.epochs(1):
        seen = 0
        for x, y in loader:
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            seen += len(x)
        het.report({"seen": seen, "loss": 0.0}, reduce={"seen": "sum"}, checkpoint=False)
    return [text for text in told if "do not count" in text]


def test_a_sum_that_holds_samples_which_do_not_count_is_warned_of(tmp_path):
    """The last batch has one sample, and the second worker gets two that stand in for it."""
    outcome = run(a_sum_of_its_own, tmp_path, num_slots=2, config=CONFIG)
    assert outcome.results[0] == []
    assert len(outcome.results[1]) == 1 and "'seen'" in outcome.results[1][0]
