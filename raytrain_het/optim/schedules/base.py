"""What a decay schedule is: the learning rate as a pure function of progress."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

from raytrain_het.named_options import FROM_0, FROM_0_TO_1, TRUE_OR_FALSE, NamedOptions, option


@dataclass(frozen=True, kw_only=True)
class Schedule(NamedOptions, abc.ABC):
    """The factor by which a learning rate is multiplied, after so much progress.

    Progress ``e`` is counted in epochs, and fractions of one by samples. During the first ``w = warmup_epochs`` the
    factor rises in a line, from ``f = warmup_from`` to 1: ``f + (1 - f) e / w``. After them the decay begins,
    ``decay(e - w)``. A schedule remembers nothing from step to step. So it is right after a resume, for a step that is
    done again, and on a worker that has just joined.
    """

    field = "schedule"
    example = "{'cosine': {'floor': 0.01}}"

    warmup_epochs: float = option(0.0, FROM_0)
    warmup_from: float = option(0.0, FROM_0_TO_1)
    per_epoch: bool = option(False, TRUE_OR_FALSE)
    """Whether the decay stays the same within an epoch: its progress is rounded down to whole epochs."""

    def factor(self, epochs: float, num_epochs: float) -> float:
        """The factor after ``epochs`` of a run of ``num_epochs``; 1 is the optimizer's own rate."""
        if epochs < self.warmup_epochs:
            return self.warmup_from + (1 - self.warmup_from) * epochs / self.warmup_epochs
        passed = epochs - self.warmup_epochs
        return self.decay(rounded_down(passed) if self.per_epoch else passed, num_epochs - self.warmup_epochs)

    @abc.abstractmethod
    def decay(self, epochs: float, num_epochs: float) -> float:
        """The factor after ``epochs`` of the ``num_epochs`` that follow the warm-up."""

    def check_run(self, num_epochs: float) -> None:
        """Refuse a run that ends before its warm-up does.

        Raises:
            ConfigError: The warm-up is as long as a run of so many epochs, or longer.
        """
        self.check(
            "warmup_epochs",
            self.warmup_epochs < num_epochs,
            f"less than the run's {num_epochs:g} epochs: else the decay never begins",
        )


@dataclass(frozen=True, kw_only=True)
class ToFloor(Schedule):
    """A schedule that falls from 1 to ``floor`` over all ``E`` epochs that follow the warm-up:
    ``floor + (1 - floor) shape(e / E)``."""

    floor: float = option(0.0, FROM_0_TO_1)
    """The factor at the end."""

    def decay(self, epochs: float, num_epochs: float) -> float:
        return self.floor + (1 - self.floor) * self.shape(min(1.0, epochs / num_epochs))

    @abc.abstractmethod
    def shape(self, part: float) -> float:
        """From 1 to 0, as ``part`` goes from 0 to 1."""


def rounded_down(number: float) -> int:
    """The whole number below. A number that lies just below a whole one only because of binary fractions, such as
    ``3 * 0.1 / 0.1``, counts as that whole one."""
    return math.floor(number + 1e-9)
