"""The optimizer ``adam``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raytrain_het.named_options import ABOVE_0, FROM_0_BELOW_1, option
from raytrain_het.optim.optimizers.base import Optimizer


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Moments ``m`` and ``s`` of the gradient with ``beta1`` and ``beta2``, both without their bias towards 0;
    ``w <- w - lr m / (sqrt(s) + eps)``. (Kingma, Ba 2015, arXiv:1412.6980.)"""

    name = "adam"
    torch_name = "Adam"

    beta1: float = option(0.9, FROM_0_BELOW_1)
    beta2: float = option(0.999, FROM_0_BELOW_1)
    eps: float = option(1e-8, ABOVE_0)

    def torch_options(self) -> dict[str, Any]:
        return {"betas": (self.beta1, self.beta2), "eps": self.eps}
