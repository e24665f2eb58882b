"""The learning rate of each step, by the run's schedule."""

from __future__ import annotations

import torch

from raytrain_het.optim import Schedule
from raytrain_het.training.cursor import Cursor, DataPlan

_FIRST = "initial_lr"
"""As torch's schedulers call a group's own rate, which is kept in checkpoints with it."""


class Rates:
    """Sets ``lr = initial_lr * factor(e)`` with ``e = epoch + offset / N``, the progress before a step.

    Args:
        schedule: gives the factor.
        plan: the dataset's size, ``N``.
        num_epochs: of the whole run.

    Raises:
        ConfigError: the schedule's warm-up is longer than the run.
    """

    def __init__(self, schedule: Schedule, plan: DataPlan, num_epochs: int) -> None:
        schedule.check_run(num_epochs)
        self._schedule, self._size, self._num_epochs = schedule, plan.dataset_size, num_epochs

    def factor(self, cursor: Cursor) -> float:
        """Of the step that begins there."""
        return self._schedule.factor(cursor.epoch + cursor.offset / self._size, self._num_epochs)

    def set(self, optimizer: torch.optim.Optimizer, cursor: Cursor) -> None:
        """For the step that begins there."""
        factor = self.factor(cursor)
        for group in optimizer.param_groups:
            rate = group["lr"]
            if isinstance(rate, torch.Tensor):
                rate.fill_(group.setdefault(_FIRST, rate.item()) * factor)
            else:
                group["lr"] = group.setdefault(_FIRST, rate) * factor
