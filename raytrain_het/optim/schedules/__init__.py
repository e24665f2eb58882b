"""Decay schedules by name. A new one is one file, and one line in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytrain_het.named_options import choose
from raytrain_het.optim.schedules.base import Schedule
from raytrain_het.optim.schedules.constant import Constant
from raytrain_het.optim.schedules.cosine import Cosine
from raytrain_het.optim.schedules.exponential import Exponential
from raytrain_het.optim.schedules.inverse_time import InverseTime
from raytrain_het.optim.schedules.linear import Linear
from raytrain_het.optim.schedules.step import Step

SCHEDULES: dict[str, type[Schedule]] = {
    kind.name: kind
    for kind in (
        Constant,
        Step,
        Exponential,
        InverseTime,
        Cosine,
        Linear,
    )
}

__all__ = ["SCHEDULES", "Schedule", "schedule_of"]


def schedule_of(written: str | Mapping[str, Any]) -> Schedule:
    """The schedule that a configuration asks for: ``"cosine"``, or ``{"cosine": {"floor": 0.01, "warmup_epochs": 1}}``.

    Raises:
        ConfigError: There is no such schedule or option, or a value is not allowed.
    """
    return choose(SCHEDULES, written)
