"""The schedule ``constant``."""

from __future__ import annotations

from raytrain_het.optim.schedules.base import Schedule


class Constant(Schedule):
    """``1``: after the warm-up the optimizer's own rate."""

    name = "constant"

    def decay(self, epochs: float, num_epochs: float) -> float:
        return 1.0
