"""``step``."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.optim.schedule import Schedule, whole
from raytrain_het.plain import is_number


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """``gamma^floor(e / d)``: every ``d = every_epochs`` the rate is multiplied by ``gamma``."""

    name = "step"

    gamma: float = 0.1
    """Above 0, at most 1."""
    every_epochs: float = 10.0
    """Above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("gamma", is_number(self.gamma) and 0 < self.gamma <= 1, "a number above 0 and at most 1")
        self.check("every_epochs", is_number(self.every_epochs) and self.every_epochs > 0, "a number above 0")

    def decay(self, epochs: float, num_epochs: float) -> float:
        return self.gamma ** whole(epochs / self.every_epochs)
