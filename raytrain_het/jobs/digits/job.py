"""The keys of the digits job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from raytrain_het.jobs.config import JobConfig, OptimizerChoice, check_batch_size

if TYPE_CHECKING:
    import torch

    from raytrain_het.jobs.training_step import TrainingStep

NUM_SAMPLES = 1437
"""The job trains on so many: four fifths of scikit-learn's 1,797 digits."""


def _sgd() -> OptimizerChoice:
    return {"sgd": {"momentum": 0.9, "weight_decay": 5e-4}}


@dataclass(frozen=True, kw_only=True)
class DigitsJob(JobConfig):
    """A small conv net on scikit-learn's handwritten digits.

    Raises:
        ConfigError: Two fields contradict each other.
    """

    requires = ("sklearn",)
    optimizer_keys = ("lr", "optimizer")

    kind: Literal["digits"] = "digits"

    epochs: Annotated[int, pydantic.Field(ge=1)] = 20
    """Passes over the training part of the data."""

    global_batch_size: Annotated[int, pydantic.Field(ge=1)] = 64
    """Samples in one step, over all workers."""

    lr: Annotated[float, pydantic.Field(gt=0)] = 0.05
    """Learning rate, before the schedule."""

    optimizer: OptimizerChoice = field(default_factory=_sgd)
    """``sgd``, ``adagrad``, ``rmsprop``, ``adam`` or ``adamw``, or one with options (docs/training.md has them all),
    such as ``{sgd: {momentum: 0.9, weight_decay: 0.0005}}``. Biases and norms do not decay, unless ``decay_all``."""

    label_smoothing: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.1
    """This much of the target is spread over all ten digits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batch_size(self.global_batch_size, self.num_workers)

    @staticmethod
    def train(config: dict[str, Any]) -> None:
        from raytrain_het.jobs.digits.training import train_digits

        train_digits(config)

    @staticmethod
    def make_step(config: dict[str, Any], device: torch.device) -> TrainingStep:
        from raytrain_het.jobs.digits.training import make_step

        return make_step(config, device)

    def metrics(self) -> dict[str, Literal["min", "max"]]:
        return {"accuracy": "max", "held_out_loss": "min", "train_loss": "min"}

    def num_samples(self) -> int:
        return NUM_SAMPLES
