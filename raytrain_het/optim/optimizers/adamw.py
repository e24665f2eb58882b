"""The optimizer ``adamw``."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.named_options import FROM_0, option
from raytrain_het.optim.optimizers.adam import Adam


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam whose decay is apart from the gradient: ``w <- w - lr weight_decay w``. (Loshchilov, Hutter 2019,
    arXiv:1711.05101.)"""

    name = "adamw"
    torch_name = "AdamW"

    weight_decay: float = option(0.01, FROM_0)
