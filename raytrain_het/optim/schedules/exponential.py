"""The schedule ``exponential``."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.named_options import ABOVE_0_TO_1, option
from raytrain_het.optim.schedules.base import Schedule


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """``gamma^e``."""

    name = "exponential"

    gamma: float = option(0.95, ABOVE_0_TO_1)
    """The factor of one epoch."""

    def decay(self, epochs: float, num_epochs: float) -> float:
        return self.gamma**epochs
