"""Programs as people bring them train as one process with the whole batch would. Two workers, shares 3:1, fp64."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from labs import run
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset, TensorDataset

import raytrain_het as het
from raytrain_het.config import HetConfig
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.processes import WorkersFailedError
from raytrain_het.testing.regression import relative_error
from raytrain_het.worker.session import current

CONFIG = HetConfig(shares=(3, 1), bucket_mib=0.0002, silence_s=10)
EPOCHS, BATCH = 3, 8


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 6, dtype=torch.float64, generator=generator)
    y = x.sum(1, keepdim=True) * torch.where(torch.arange(32) % 8 >= 6, 5.0, 1.0)[:, None]
    return TensorDataset(x, y.double())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything by name; complex numbers as pairs."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: torch.view_as_real(t) if t.is_complex() else t.detach().double() for name, t in named}


class Program:
    """A model, an optimizer and a loop's body, run by :meth:`het` on workers and by :meth:`plain` in one process."""

    loss = "mean"

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(model(x), y)

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        self.forward(model, x, y).backward()
        optimizer.step()

    def epoch(self, model: nn.Module, epoch: int) -> None:
        pass

    def made(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().double()

    def __call__(self, directory: str) -> dict[str, torch.Tensor]:
        model = het.prepare_model(self.made())
        optimizer = het.prepare_optimizer(self.optimizer(model))
        loader = het.prepare_data_loader(DataLoader(data()), global_batch_size=BATCH, **self.loader_options())
        for epoch in loader.epochs(EPOCHS):
            self.epoch(model, epoch)
            for x, y in loader:
                self.body(model, optimizer, x, y)
        return state(model)

    def loader_options(self) -> dict[str, Any]:
        return {}

    def plain(self) -> dict[str, torch.Tensor]:
        model = self.made()
        optimizer = self.optimizer(model)
        x, y = data().tensors
        for epoch in range(EPOCHS):
            self.epoch(model, epoch)
            for k in range(0, len(x), BATCH):
                self.body(model, optimizer, x[k : k + BATCH], y[k : k + BATCH])
        return state(model)


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


class HooksOnParameters(Program):
    """One clips, one writes where a post-accumulate hook is put on after the pass before."""

    def build(self) -> nn.Module:
        model = super().build()
        model[0].weight.register_hook(lambda g: g.clamp(-0.1, 0.1))
        model[2].weight.register_hook(lambda g: g / g.norm())
        model[2].bias.register_post_accumulate_grad_hook(self.clipped)
        return model

    @staticmethod
    def clipped(p: torch.Tensor) -> None:
        assert p.grad is not None
        p.grad.clamp_(-0.2, 0.2)

    def epoch(self, model: nn.Module, epoch: int) -> None:
        if epoch == 1:
            model[0].bias.register_post_accumulate_grad_hook(self.clipped)


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


class BuffersByHand(Program):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 1)
            self.register_buffer("before_step", torch.zeros(1))
            self.register_buffer("after_step", torch.ones(1).expand(3))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("seen", torch.zeros(2, dtype=torch.bool), persistent=False)
            self.register_buffer("nothing", None)
            self.register_buffer("phase", torch.ones(2, dtype=torch.complex128))
            self.register_buffer("mean", torch.full((6,), float("inf")))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 2**40
            self.seen[1] = True
            batch = x.detach().mean(0)
            self.mean.copy_(torch.where(self.mean.isfinite(), 0.9 * self.mean + 0.1 * batch, batch))
            self.phase.mul_(0.9j).add_(batch[0])
            return self.lin(x) * self.before_step.detach().clamp(max=1)

    def build(self) -> nn.Module:
        return self.Net()

    def body(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        self.forward(model, x, y).backward()
        model.before_step.add_(0.25).clamp_(max=2)
        optimizer.step()
        model.after_step = model.after_step * 1.5


class ChannelsLastFused(Program):
    def build(self) -> nn.Module:
        model = nn.Sequential(nn.Unflatten(1, (3, 2, 1)), nn.Conv2d(3, 4, (2, 1)), nn.Flatten(), nn.Linear(4, 1))
        return model.double().to(memory_format=torch.channels_last)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        model[1].weight.data = model[1].weight.data.to(memory_format=torch.channels_last)
        return torch.optim.Adam(model.parameters(), lr=0.02, fused=True)


class Sum(Program):
    def loader_options(self) -> dict[str, Any]:
        return {"loss": "sum", "micro_batch_size": 2}

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(model(x), y, reduction="sum") / 64


class MeanOfSome(Program):
    """Of the samples whose first number is positive."""

    def loader_options(self) -> dict[str, Any]:
        return {"weight": lambda batch: (batch[0][:, 0] > 0).sum()}

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mask = x[:, :1] > 0
        return ((model(x) - y).square() * mask).sum() / mask.sum().clamp(min=1)


class ManyPasses(Program):
    def loader_options(self) -> dict[str, Any]:
        return {"micro_batch_size": 1}


class StepAlongTheGradientOfAMean(Program):
    def loader_options(self) -> dict[str, Any]:
        return {"micro_batch_size": 5}

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.mse_loss(model(x), y), x)
        return F.mse_loss(model(x.detach() + self.size(gradient)), y)

    def size(self, gradient: torch.Tensor) -> torch.Tensor:
        return 0.5 * gradient


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
