"""The optimizer ``adagrad``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raytrain_het.named_options import ABOVE_0, option
from raytrain_het.optim.optimizers.base import Optimizer


@dataclass(frozen=True, kw_only=True)
class AdaGrad(Optimizer):
    """``s <- s + g^2``, ``w <- w - lr g / (sqrt(s) + eps)``. (Duchi, Hazan, Singer 2011.)"""

    name = "adagrad"
    torch_name = "Adagrad"

    eps: float = option(1e-10, ABOVE_0)

    def torch_options(self) -> dict[str, Any]:
        return {"eps": self.eps}
