"""The optimizer ``sgd``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raytrain_het.named_options import FROM_0_BELOW_1, TRUE_OR_FALSE, option
from raytrain_het.optim.optimizers.base import Optimizer


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """``v <- momentum v + g``, ``w <- w - lr v`` (with ``nesterov``: ``w - lr (g + momentum v)``)."""

    name = "sgd"
    torch_name = "SGD"

    momentum: float = option(0.9, FROM_0_BELOW_1)
    nesterov: bool = option(False, TRUE_OR_FALSE)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.momentum > 0 or not self.nesterov
        self.check("nesterov", ok, "true or false, and true with a momentum above 0 only")

    def torch_options(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "nesterov": self.nesterov}
