"""``constant``."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.optim.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """``1``: after the warm-up the optimizer's own rate."""

    name = "constant"

    def decay(self, epochs: float, num_epochs: float) -> float:
        return 1.0
