"""The schedule ``step``."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.named_options import ABOVE_0, ABOVE_0_TO_1, option
from raytrain_het.optim.schedules.base import Schedule, rounded_down


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """``gamma^floor(e / d)``: every ``d = every_epochs`` the rate is multiplied by ``gamma``."""

    name = "step"

    gamma: float = option(0.1, ABOVE_0_TO_1)
    every_epochs: float = option(10.0, ABOVE_0)

    def decay(self, epochs: float, num_epochs: float) -> float:
        return self.gamma ** rounded_down(epochs / self.every_epochs)
