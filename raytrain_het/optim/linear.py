"""``linear``."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.optim.schedule import Schedule, check, is_number


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """``1 - (1 - floor) e / E``, with ``E`` the run's epochs after the warm-up."""

    name = "linear"
    needs_end = True

    floor: float = 0.0
    """Of the rate, from 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "floor", is_number(self.floor) and 0 <= self.floor <= 1, "a number from 0 to 1")

    def decay(self, epochs: float, num_epochs: float) -> float:
        return 1 - (1 - self.floor) * min(1.0, epochs / num_epochs)
