"""The schedule ``linear``."""

from __future__ import annotations

from raytrain_het.optim.schedules.base import ToFloor


class Linear(ToFloor):
    """``1 - (1 - floor) e / E``."""

    name = "linear"

    def shape(self, part: float) -> float:
        return 1 - part
