"""Programs as people bring them: what they share, and those that several tests run. Workers import this too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.config import HetConfig

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


class Sum(Program):
    def loader_options(self) -> dict[str, Any]:
        return {"loss": "sum", "micro_batch_size": 2}

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(model(x), y, reduction="sum") / 64


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
