"""The learning rate of each step, by the run's schedule."""

from __future__ import annotations

import torch

from raytrain_het.errors import ConfigError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.optim import Schedule
from raytrain_het.worker.data.data_plan import DataPlan

OWN = "lr_before_schedule"
"""A group's own rate, which is kept in checkpoints with it. Not torch's ``initial_lr``, which its schedulers write."""


class Rates:
    """Sets ``lr = own * factor(e)``, with ``own`` what a group had at first, and the progress before a step,
    ``e = epoch + offset / N``.

    Args:
        schedule: gives the factor.
        plan: the size of each epoch, ``N``.
        num_epochs: of the whole run.

    Raises:
        ConfigError: the schedule's warm-up is longer than the run.
    """

    def __init__(self, schedule: Schedule, plan: DataPlan, num_epochs: int) -> None:
        schedule.check_run(num_epochs)
        self._schedule, self._plan, self._num_epochs = schedule, plan, num_epochs

    def factor(self, cursor: Cursor) -> float:
        """Of the step that begins there."""
        return self._schedule.factor(self._plan.progress(cursor), self._num_epochs)

    def set(self, optimizer: torch.optim.Optimizer, cursor: Cursor) -> None:
        """For the step that begins there.

        Raises:
            ConfigError: a group has no rate.
        """
        for k, group in enumerate(optimizer.param_groups):
            rate = group.get("lr")
            if not isinstance(rate, int | float | torch.Tensor):
                raise ConfigError(
                    f"schedule: {type(optimizer).__name__} has lr={rate!r} in parameter group {k}, and a schedule "
                    "multiplies a number. Give the optimizer a rate, or leave schedule out."
                )
            if OWN not in group:
                group[OWN] = float(rate)
                if isinstance(rate, torch.Tensor):  # One tensor may be that of all groups, and of those to come.
                    group["lr"] = rate.clone()
        factor = self.factor(cursor)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(group[OWN] * factor)
            else:
                group["lr"] = group[OWN] * factor


def give_back(optimizer: torch.optim.Optimizer) -> None:
    """A run that had a schedule goes on without one: groups have their own rates again."""
    for group in optimizer.param_groups:
        if OWN in group:
            own = group.pop(OWN)
            group["lr"] = torch.full_like(group["lr"], own) if isinstance(group["lr"], torch.Tensor) else own
