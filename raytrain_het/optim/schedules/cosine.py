"""The schedule ``cosine``."""

from __future__ import annotations

import math

from raytrain_het.optim.schedules.base import ToFloor


class Cosine(ToFloor):
    """``floor + (1 - floor) (1 + cos(pi e / E)) / 2``, without restarts. (Loshchilov, Hutter 2017,
    arXiv:1608.03983.)"""

    name = "cosine"

    def shape(self, part: float) -> float:
        return (1 + math.cos(math.pi * part)) / 2
