"""What a decay schedule is: the learning rate as a pure function of progress."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

from raytrain_het.optim.named import Named
from raytrain_het.plain import is_number


@dataclass(frozen=True, kw_only=True)
class Schedule(Named, abc.ABC):
    """The factor by which a learning rate is multiplied, after so much progress.

    Progress ``e`` is counted in epochs, and fractions of one by samples. In the first ``w = warmup_epochs`` the factor
    rises from ``f = warmup_from`` in a line, ``f + (1 - f) e / w``; after them the decay begins, ``decay(e - w)``.
    Nothing is remembered from step to step, so it is right after a resume, for a step that is done again, and on a
    worker that has only come.
    """

    field = "schedule"

    warmup_epochs: float = 0.0
    """From 0."""
    warmup_from: float = 0.0
    """From 0 to 1."""
    per_epoch: bool = False
    """Whether the decay goes on between epochs only: what has passed of it is rounded down to whole epochs."""

    def __post_init__(self) -> None:
        self.check("warmup_epochs", is_number(self.warmup_epochs) and self.warmup_epochs >= 0, "a number from 0")
        self.check("warmup_from", is_number(self.warmup_from) and 0 <= self.warmup_from <= 1, "a number from 0 to 1")
        self.check("per_epoch", isinstance(self.per_epoch, bool), "true or false")

    def factor(self, epochs: float, num_epochs: float) -> float:
        """After ``epochs`` of a run of ``num_epochs``; 1 is the optimizer's own rate."""
        if epochs < self.warmup_epochs:
            return self.warmup_from + (1 - self.warmup_from) * epochs / self.warmup_epochs
        passed = epochs - self.warmup_epochs
        return self.decay(whole(passed) if self.per_epoch else passed, num_epochs - self.warmup_epochs)

    @abc.abstractmethod
    def decay(self, epochs: float, num_epochs: float) -> float:
        """The factor after ``epochs`` of the ``num_epochs`` that follow the warm-up."""

    def check_run(self, num_epochs: float) -> None:
        """Raises:
        ConfigError: the warm-up is longer than a run of so many epochs.
        """
        self.check(
            "warmup_epochs",
            self.warmup_epochs < num_epochs,
            f"less than the run's {num_epochs:g} epochs: else the decay never begins",
        )


@dataclass(frozen=True, kw_only=True)
class ToFloor(Schedule):
    """One that falls from 1 to ``floor`` over all ``E`` epochs that follow the warm-up:
    ``floor + (1 - floor) shape(e / E)``."""

    floor: float = 0.0
    """Of the rate, from 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("floor", is_number(self.floor) and 0 <= self.floor <= 1, "a number from 0 to 1")

    def decay(self, epochs: float, num_epochs: float) -> float:
        return self.floor + (1 - self.floor) * self.shape(min(1.0, epochs / num_epochs))

    @abc.abstractmethod
    def shape(self, part: float) -> float:
        """From 1 to 0, as ``part`` goes from 0 to 1."""


def whole(number: float) -> int:
    """Rounded down, but for what a fraction that cannot be written in binary lacks."""
    return math.floor(number + 1e-9)
