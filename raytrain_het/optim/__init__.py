"""Decay schedules and optimizers by name. A new schedule is one file, and one line in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytrain_het.optim.constant import Constant
from raytrain_het.optim.cosine import Cosine
from raytrain_het.optim.exponential import Exponential
from raytrain_het.optim.inverse_time import InverseTime
from raytrain_het.optim.linear import Linear
from raytrain_het.optim.named import pick
from raytrain_het.optim.optimizers import OPTIMIZERS, Optimizer, optimizer_of
from raytrain_het.optim.schedule import Schedule
from raytrain_het.optim.step import Step

SCHEDULES: dict[str, type[Schedule]] = {
    kind.name: kind for kind in (Constant, Step, Exponential, InverseTime, Cosine, Linear)
}

__all__ = ["OPTIMIZERS", "SCHEDULES", "Optimizer", "Schedule", "optimizer_of", "schedule_of"]


def schedule_of(value: str | Mapping[str, Any]) -> Schedule:
    """``"cosine"``, or ``{"cosine": {"floor": 0.01, "warmup_epochs": 1}}``.

    Raises:
        ConfigError: no such schedule or option, or a value that is not allowed.
    """
    return pick(SCHEDULES, value, field="schedule", example="{'cosine': {'floor': 0.01}}")
