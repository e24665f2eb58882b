"""The schedule ``inverse_time``."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.named_options import FROM_0, option
from raytrain_het.optim.schedules.base import Schedule


@dataclass(frozen=True, kw_only=True)
class InverseTime(Schedule):
    """``1 / (1 + k e)``. With ``k = 1``, the default, it is ``1 / t`` of ``t = 1 + e``. (Robbins, Monro 1951.)"""

    name = "inverse_time"

    k: float = option(1.0, FROM_0)

    def decay(self, epochs: float, num_epochs: float) -> float:
        return 1 / (1 + self.k * epochs)
