"""``inverse_time``."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.optim.schedule import Schedule
from raytrain_het.plain import is_number


@dataclass(frozen=True, kw_only=True)
class InverseTime(Schedule):
    """``1 / (1 + k e)``; with ``k = 1``, the default, the plain ``1 / t`` of ``t = 1 + e``. (Robbins, Monro 1951.)"""

    name = "inverse_time"

    k: float = 1.0
    """From 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("k", is_number(self.k) and self.k >= 0, "a number from 0")

    def decay(self, epochs: float, num_epochs: float) -> float:
        return 1 / (1 + self.k * epochs)
