"""``exponential``."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.optim.schedule import Schedule
from raytrain_het.plain import is_number


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """``gamma^e``."""

    name = "exponential"

    gamma: float = 0.95
    """By epoch; above 0, at most 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("gamma", is_number(self.gamma) and 0 < self.gamma <= 1, "a number above 0 and at most 1")

    def decay(self, epochs: float, num_epochs: float) -> float:
        return self.gamma**epochs
