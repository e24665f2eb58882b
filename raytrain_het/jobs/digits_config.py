"""What the digits job can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pydantic

from raytrain_het.jobs.config import JobConfig, OptimizerChoice, check_batch_size

NUM_SAMPLES = 1437
"""To train on: four fifths of scikit-learn's 1,797 digits."""


def num_samples(job: DigitsJob) -> int:
    """That a job trains on."""
    return NUM_SAMPLES


def _sgd() -> OptimizerChoice:
    return {"sgd": {"momentum": 0.9, "weight_decay": 5e-4}}


@dataclass(frozen=True, kw_only=True)
class DigitsJob(JobConfig):
    """A small conv net on scikit-learn's handwritten digits.

    Raises:
        ConfigError: Two fields contradict each other.
    """

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

    def metrics(self) -> dict[str, Literal["min", "max"]]:
        return {"accuracy": "max", "held_out_loss": "min", "train_loss": "min"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batch_size(self.global_batch_size, self.num_workers)
