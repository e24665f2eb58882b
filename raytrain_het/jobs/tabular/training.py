"""The tabular job's training: linear or logistic regression, or a small network, on a file or on a made-up table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray.train.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.jobs.tabular.columns import Source
from raytrain_het.jobs.tabular.data import TableData, open_table
from raytrain_het.jobs.training_step import TrainingStep
from raytrain_het.optim import optimizer_of


def build_model(config: dict[str, Any], table: TableData) -> nn.Module:
    """A linear map, or layers with ReLU between them; one output for a regression, one per class else."""
    widths = [len(table.features), *(config["hidden"] if config["model"] == "mlp" else ())]
    layers: list[nn.Module] = []
    for inner, outer in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1 if table.classes is None else len(table.classes)))


class ProximalSGD(torch.optim.SGD):
    """SGD whose steps end with soft thresholding: ``w <- sign(w) max(|w| - s, 0)``, ``s = lr l1 / (1 - momentum)``.

    The proximal step of an L1 penalty: weights that do not matter become 0 exactly, as a gradient of ``|w|`` never
    makes them. With momentum a gradient that stays the same moves a weight ``1 / (1 - momentum)`` times as far, and so
    must the threshold. ``l1`` is an entry of the parameter groups.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, on all parameters."""
        value = super().step(closure)
        for group in self.param_groups:
            if group["l1"]:
                threshold = group["lr"] * group["l1"] / (1 - group["momentum"])
                for w in group["params"]:
                    w.copy_(F.softshrink(w, threshold))
        return value


def make_optimizer(config: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """Minimises the loss ``+ l1 sum |w| + l2 / 2 sum w^2`` over weights; biases are not held down."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": config["l2"], "l1": config["l1"]}, {"params": biases, "l1": 0.0}]
    optimizer = optimizer_of(config["optimizer"])
    make: Any = ProximalSGD if optimizer.name == "sgd" else getattr(torch.optim, optimizer.torch_name)
    made: torch.optim.Optimizer = make(groups, lr=config["lr"], **optimizer.torch_options())
    return made


def make_loss(table: TableData) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean squared error, or mean cross-entropy."""
    if table.classes is None:
        return lambda out, y: F.mse_loss(out.squeeze(1), y)
    return F.cross_entropy


def make_step(config: dict[str, Any], device: torch.device) -> TrainingStep:
    """The job's training step by itself."""
    table = open_table(Source.of(config))
    model = build_model(config, table).to(device)
    train_set, _ = _data_sets(table)
    return TrainingStep(train_set, model, make_optimizer(config, model), make_loss(table), device)


def train_tabular(config: dict[str, Any]) -> None:
    """The training function: the fields of :class:`TabularJob`, and ``seed``, as a dict."""
    torch.manual_seed(config["seed"])
    device = ray.train.torch.get_device()
    table = open_table(Source.of(config))
    train_set, test_set = _data_sets(table)

    model = het.prepare_model(build_model(config, table))
    optimizer = het.prepare_optimizer(make_optimizer(config, model))
    loader = het.prepare_data_loader(DataLoader(train_set, shuffle=True), global_batch_size=config["global_batch_size"])
    loss_of = make_loss(table)

    def held_out(batch: Any) -> dict[str, float | Tensor]:
        features, target = (part.to(device) for part in batch)
        out = model(features)
        if table.classes is None:
            error = F.mse_loss(out.squeeze(1), target, reduction="sum")
            return {"held_out_mse": error.double() * table.target_deviation**2}
        return {
            "held_out_accuracy": (out.argmax(dim=1) == target).sum(),
            "held_out_loss": F.cross_entropy(out, target, reduction="sum"),
        }

    for _ in loader.epochs(config["epochs"]):
        losses = []
        for features, target in loader:
            loss = loss_of(model(features), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        train_loss = torch.stack(losses).mean().item() if losses else 0.0
        het.report({"train_loss": train_loss, **het.evaluate(held_out, test_set, batch_size=16384)})


def _data_sets(table: TableData) -> tuple[TensorDataset, TensorDataset]:
    x, y, n = torch.from_numpy(table.x), torch.from_numpy(table.y), table.num_train
    train_set = TensorDataset(x[:n], y[:n])
    # Of its own type, a subclass's samples would be fetched one by one.
    train_set.fingerprint = table.fingerprint  # type: ignore[attr-defined]
    return train_set, TensorDataset(x[n:], y[n:])
