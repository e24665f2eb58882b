"""The digits job's training: scikit-learn's 1,797 handwritten digits and a small conv net.

The data comes with scikit-learn: the smallest real run needs no download.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ray.train.torch
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import raytrain_het as het
from raytrain_het.jobs.optimizer import make_optimizer
from raytrain_het.jobs.training_step import TrainingStep


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """One part of the digits: images of shape (1, 8, 8) in [0, 1], and their labels.

    Args:
        images: Shape (N, 1, 8, 8).
        labels: Shape (N,).
        shift: Whether each image is moved by up to one pixel in either direction, anew each time.
            The random numbers come from torch's default generator, which is seeded for each sample.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, shift: bool) -> None:
        self.images = F.pad(images, (1, 1, 1, 1)) if shift else images
        self.labels = labels
        self.shift = shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.shift:
            down, right = torch.randint(0, 3, (2,)).tolist()
            image = image[:, down : down + 8, right : right + 8]
        return image, self.labels[index]


def digits_split(seed: int) -> tuple[Digits, Digits]:
    """The training part (80 %) and the held-out part, stratified by label and fixed by ``seed``."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=data.target, random_state=seed)
    return Digits(images[train], labels[train], shift=True), Digits(images[test], labels[test], shift=False)


def build_model() -> nn.Module:
    """Two convolutions and two linear layers, 151,306 parameters. No batch norm and no dropout:
    what a worker computes for a sample depends on that sample alone."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def make_loss(config: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross-entropy with smoothed labels."""
    return partial(F.cross_entropy, label_smoothing=config["label_smoothing"])


def make_step(config: dict[str, Any], device: torch.device) -> TrainingStep:
    """The job's training step by itself."""
    model = build_model().to(device)
    train_set, _ = digits_split(config["seed"])
    return TrainingStep(train_set, model, make_optimizer(config, model), make_loss(config), device)


def train_digits(config: dict[str, Any]) -> None:
    """The training function: the fields of :class:`DigitsJob`, and ``seed``, as a dict."""
    torch.manual_seed(config["seed"])
    device = ray.train.torch.get_device()
    train_set, test_set = digits_split(config["seed"])

    model = het.prepare_model(build_model())
    optimizer = het.prepare_optimizer(make_optimizer(config, model))
    loader = het.prepare_data_loader(DataLoader(train_set, shuffle=True), global_batch_size=config["global_batch_size"])

    loss_of = make_loss(config)

    @torch.no_grad()
    def held_out(batch: tuple[Tensor, Tensor]) -> dict[str, float | Tensor]:
        images, labels = (part.to(device) for part in batch)
        scores = model(images)
        return {
            "accuracy": (scores.argmax(dim=1) == labels).sum(),
            "held_out_loss": F.cross_entropy(scores, labels, reduction="sum"),
        }

    for _ in loader.epochs(config["epochs"]):
        # Kept as tensors: to read a number from a GPU in every step would make it wait.
        losses = []
        for images, labels in loader:
            loss = loss_of(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        # A worker that joins at the last step of an epoch has trained on nothing in it.
        train_loss = torch.stack(losses).mean().item() if losses else 0.0
        het.report({"train_loss": train_loss, **het.evaluate(held_out, test_set)})
