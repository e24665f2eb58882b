"""Decay schedules and optimizers by name: torch-free options. A new one is one file, and one line in a table."""

from __future__ import annotations

from raytrain_het.optim.optimizers import OPTIMIZERS, Optimizer, optimizer_of
from raytrain_het.optim.schedules import SCHEDULES, Schedule, schedule_of

__all__ = ["OPTIMIZERS", "SCHEDULES", "Optimizer", "Schedule", "optimizer_of", "schedule_of"]
