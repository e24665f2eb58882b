"""Programs whose training would go wrong are refused, and the error names what and where."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from labs import run
from programs import (
    CONFIG,
    BuffersByHand,
    Program,
    StepAlongTheGradientOfAMean,
)
from torch import nn

import raytrain_het as het
from raytrain_het.testing.processes import WorkersFailedError
from raytrain_het.worker.session import current


class UnsaidSum(Program):
    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (model(x) - y).square().sum()


class ParametersOutside(Program):
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1)


class Unfreezing(Program):
    def build(self) -> nn.Module:
        model = super().build()
        model[0].requires_grad_(False)
        return model

    def epoch(self, model: nn.Module, epoch: int) -> None:
        model[0].requires_grad_(epoch == 1)


class NewHead(Program):
    def epoch(self, model: nn.Module, epoch: int) -> None:
        if epoch == 1:
            model[2] = nn.Linear(8, 1).double()


class TwoOptimizers(Program):
    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        other = nn.Parameter(torch.zeros(1))
        super().body(model, optimizer, x, y * 1)
        del other

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        critic = nn.Linear(1, 1).double()
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
        critic(y).mean().backward()
        optimizer.step()
        return super().forward(model, x, y)


class SamplesCounted(Program):
    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 1)
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += len(x)
            return super().forward(x)

    def build(self) -> nn.Module:
        return self.Net()


class GrowingBuffer(Program):
    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 1)
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = torch.cat([self.seen, x.detach()[:, 0]])
            return super().forward(x)

    def build(self) -> nn.Module:
        return self.Net()


class GraphOfTheGradient(Program):
    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        self.forward(model, x, y).backward(create_graph=True)
        optimizer.step()


class GradientsByHand(Program):
    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        for p, g in zip(
            model.parameters(), torch.autograd.grad(self.forward(model, x, y), [*model.parameters()]), strict=True
        ):
            p.grad = g
        optimizer.step()


class OwnSettings(Program):
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.02 * (1 + current().slot))


class Wrapped(torch.optim.Optimizer):
    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups, self.defaults, self.state = base, base.param_groups, base.defaults, base.state

    def step(self) -> None:  # type: ignore[override]
        self.base.step()


class WrapperOfAnOptimizer(Program):
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return Wrapped(super().optimizer(model))


class ContrastOfSamples(Program):
    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = F.normalize(model[:2](x))
        return F.cross_entropy(z @ z.T, torch.arange(len(x)))


class TargetsNormalisedByTheBatch(Program):
    def loader_options(self) -> dict[str, Any]:
        return {"micro_batch_size": 5}  # Another number than that of features.

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(model(x), (y - y.mean()) / (y.std() + 1e-8))


class TargetsNormalisedFromTheSecondEpochOn(TargetsNormalisedByTheBatch):
    at = 0

    def epoch(self, model: nn.Module, epoch: int) -> None:
        self.at = epoch

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (super() if self.at else super(TargetsNormalisedByTheBatch, self)).forward(model, x, y)


class RootInAFunctionOfItsOwn(Program):
    """A mean over the pass inside of a function of its own, which the graph does not show."""

    def loader_options(self) -> dict[str, Any]:
        return {"micro_batch_size": 5}

    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.square().mean().sqrt()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            return grad * x / (x.numel() * x.square().mean().sqrt())

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.Root.apply(model(x) - y)


class BackwardInAThread(Program):
    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.forward(model, x, y).backward).result()
        optimizer.step()


class TriesThePassAgain(Program):
    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = super().forward(model, x, y)
        hidden = model[1](model[0](x))
        hidden.register_hook(lambda _: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            F.mse_loss(model[2](hidden), y).backward()
        return loss


REFUSED = {
    UnsaidSum: r"loss='sum'",
    ParametersOutside: r"parameter 4 of group 0, of shape \[3\]",
    Unfreezing: r"'0.weight' is",
    NewHead: r"module '2' was replaced",
    TwoOptimizers: r"was not prepared has taken a step.*a SGD",
    SamplesCounted: r"buffer 'seen' \(torch.int64\) differs between workers",
    GrowingBuffer: r"buffer keeps its shape.*'seen' had shape \[0\]",
    GraphOfTheGradient: r"create_graph=True",
    GradientsByHand: r"torch.autograd.grad\(\) returns",
    WrapperOfAnOptimizer: r"state_dict\(\) raises AttributeError.*super\(\).__init__\(params, defaults\) in Wrapped",
    OwnSettings: r"lr of parameter group 0 is 0.0[24] on this worker, and 0.0[24] on the one",
    ContrastOfSamples: r"of the samples of a pass together.*MmBackward0.*loss='local'",
    TargetsNormalisedByTheBatch: r"of a pass together.*: they meet in torch's \w+ \(test_programs.*\).*loss='local'",
    TargetsNormalisedFromTheSecondEpochOn: r"they meet in torch's",
    RootInAFunctionOfItsOwn: r"they meet in torch's sqrt",
    StepAlongTheGradientOfAMean: r"they meet in torch's grad \(.*\) of a mean over samples.*take the sum there",
    TriesThePassAgain: r"backward\(\) has raised.*began another pass",
    BackwardInAThread: r"begun by an extension or in another thread",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_can_not_be_trained_right_is_refused_by_name(tmp_path, kind: Callable[[], Program]):
    with pytest.raises(WorkersFailedError, match=f"(?s){REFUSED[kind]}"):
        run(kind(), tmp_path, num_slots=2, config=CONFIG)


class OwnRates(Program):
    """A rate that follows a worker's own loss."""

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = self.forward(model, x, y)
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + loss.item())
        optimizer.step()


class OwnNoiseOnTheGradient(Program):
    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        self.forward(model, x, y).backward()
        model[2].weight.grad.add_(torch.randn_like(model[2].weight), alpha=0.01)
        optimizer.step()


class OwnWeights(Program):
    """Weights that the loop changes by its own samples."""

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        super().body(model, optimizer, x, y)
        with torch.no_grad():
            model[0].bias.add_(x.mean(), alpha=0.01)


class OwnBuffer(BuffersByHand):
    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        Program.body(self, model, optimizer, x, y)
        model.mean.mul_(0.9).add_(0.1 * x.mean(0))


class OwnState(Program):
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self.meter = nn.Linear(2, 1)
        het.register_state("meter", self.meter)
        return super().optimizer(model)

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        super().body(model, optimizer, x, y)
        with torch.no_grad():
            self.meter.bias.add_(x.mean())


class OwnFreezing(Program):
    def epoch(self, model: nn.Module, epoch: int) -> None:
        model[0].requires_grad_(current().slot != 1)


DIFFERENT = {
    OwnRates: r"after step 1 lr of parameter group 0 is .* on worker 0, .* on worker 1",
    OwnNoiseOnTheGradient: r"after step 1 2.weight is another one on each of workers 0 and 1",
    OwnWeights: r"after step 1 0.bias is another one on each",
    OwnBuffer: r"after step 1 buffer mean is another one on each",
    OwnState: r"after step 1 registered meter.bias is another one on each",
    OwnFreezing: r"after step 0 which parameters have requires_grad is '1111' on worker 0, '0011' on worker 1",
}


@pytest.mark.parametrize("kind", DIFFERENT, ids=lambda kind: kind.__name__)
def test_replicas_that_differ_are_an_error_that_names_what_and_when_and_who(tmp_path, kind: Callable[[], Program]):
    with pytest.raises(WorkersFailedError, match=f"(?s)replicas differ: {DIFFERENT[kind]}"):
        run(kind(), tmp_path, num_slots=2, config=CONFIG)
