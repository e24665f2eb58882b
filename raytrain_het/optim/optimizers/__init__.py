"""Optimizers by name, as job files write them. A new one is one file, and one line in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytrain_het.named_options import choose
from raytrain_het.optim.optimizers.adagrad import AdaGrad
from raytrain_het.optim.optimizers.adam import Adam
from raytrain_het.optim.optimizers.adamw import AdamW
from raytrain_het.optim.optimizers.base import Optimizer
from raytrain_het.optim.optimizers.rmsprop import RMSProp
from raytrain_het.optim.optimizers.sgd import SGD

OPTIMIZERS: dict[str, type[Optimizer]] = {
    kind.name: kind
    for kind in (
        SGD,
        AdaGrad,
        RMSProp,
        Adam,
        AdamW,
    )
}

__all__ = ["OPTIMIZERS", "Optimizer", "optimizer_of"]


def optimizer_of(written: str | Mapping[str, Any]) -> Optimizer:
    """The optimizer that a job asks for: ``"adamw"``, or ``{"sgd": {"momentum": 0.9, "weight_decay": 0.0005}}``.

    Raises:
        ConfigError: There is no such optimizer or option, or a value is not allowed.
    """
    return choose(OPTIMIZERS, written)
