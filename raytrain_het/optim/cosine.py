"""``cosine``."""

from __future__ import annotations

import math

from raytrain_het.optim.schedule import ToFloor


class Cosine(ToFloor):
    """``floor + (1 - floor) (1 + cos(pi e / E)) / 2``. (Loshchilov, Hutter 2017, without restarts.)"""

    name = "cosine"

    def shape(self, part: float) -> float:
        return (1 + math.cos(math.pi * part)) / 2
