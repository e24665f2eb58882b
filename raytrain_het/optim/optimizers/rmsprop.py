"""The optimizer ``rmsprop``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raytrain_het.named_options import ABOVE_0, FROM_0_BELOW_1, option
from raytrain_het.optim.optimizers.base import Optimizer


@dataclass(frozen=True, kw_only=True)
class RMSProp(Optimizer):
    """``s <- q s + (1 - q) g^2``, ``w <- w - lr g / (sqrt(s) + eps)``, with ``q = smoothing``. (Hinton, lecture 6e.)"""

    name = "rmsprop"
    torch_name = "RMSprop"

    smoothing: float = option(0.99, FROM_0_BELOW_1)
    """torch calls it ``alpha``."""
    momentum: float = option(0.0, FROM_0_BELOW_1)
    eps: float = option(1e-8, ABOVE_0)

    def torch_options(self) -> dict[str, Any]:
        return {"alpha": self.smoothing, "momentum": self.momentum, "eps": self.eps}
