"""Optimizers by name, as job files write them. The objects themselves are torch's: ``raytrain_het.jobs.optimizer``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from raytrain_het.optim.named import Named, pick
from raytrain_het.plain import is_number


@dataclass(frozen=True, kw_only=True)
class Optimizer(Named):
    """What all have in common. The rate is the job's own field, ``lr``."""

    field = "optimizer"
    torch_name: ClassVar[str]
    """Of the class in ``torch.optim``."""

    weight_decay: float = 0.0
    """From 0: an L2 penalty, added to the gradient; ``adamw`` takes it off the weights instead."""
    decay_all: bool = False
    """Whether biases, and what normalisation layers learn, decay too."""

    def __post_init__(self) -> None:
        self.check("weight_decay", is_number(self.weight_decay) and self.weight_decay >= 0, "a number from 0")
        self.check("decay_all", isinstance(self.decay_all, bool), "true or false")

    def torch_options(self) -> dict[str, Any]:
        """What torch's class is given besides parameters, rate and decay."""
        return {}

    def _check_part(self, option: str) -> None:
        value = getattr(self, option)
        self.check(option, is_number(value) and 0 <= value < 1, "a number from 0, below 1")

    def _check_eps(self, option: str = "eps") -> None:
        value = getattr(self, option)
        self.check(option, is_number(value) and value > 0, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """``v <- momentum v + g``, ``w <- w - lr v`` (with ``nesterov``: ``w - lr (g + momentum v)``)."""

    name = "sgd"
    torch_name = "SGD"

    momentum: float = 0.9
    """From 0, below 1."""
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_part("momentum")
        ok = isinstance(self.nesterov, bool) and (self.momentum > 0 or not self.nesterov)
        self.check("nesterov", ok, "true or false, and true with a momentum above 0 only")

    def torch_options(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "nesterov": self.nesterov}


@dataclass(frozen=True, kw_only=True)
class AdaGrad(Optimizer):
    """``s <- s + g^2``, ``w <- w - lr g / (sqrt(s) + eps)``. (Duchi, Hazan, Singer 2011.)"""

    name = "adagrad"
    torch_name = "Adagrad"

    eps: float = 1e-10
    """Above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_eps()

    def torch_options(self) -> dict[str, Any]:
        return {"eps": self.eps}


@dataclass(frozen=True, kw_only=True)
class RMSProp(Optimizer):
    """``s <- q s + (1 - q) g^2``, ``w <- w - lr g / (sqrt(s) + eps)``, with ``q = smoothing``. (Hinton, lecture 6e.)"""

    name = "rmsprop"
    torch_name = "RMSprop"

    smoothing: float = 0.99
    """From 0, below 1. torch calls it ``alpha``."""
    momentum: float = 0.0
    """From 0, below 1."""
    eps: float = 1e-8
    """Above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_part("smoothing")
        self._check_part("momentum")
        self._check_eps()

    def torch_options(self) -> dict[str, Any]:
        return {"alpha": self.smoothing, "momentum": self.momentum, "eps": self.eps}


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Moments ``m`` and ``s`` of the gradient with ``beta1`` and ``beta2``, both without their bias towards 0;
    ``w <- w - lr m / (sqrt(s) + eps)``. (Kingma, Ba 2015.)"""

    name = "adam"
    torch_name = "Adam"

    beta1: float = 0.9
    """From 0, below 1."""
    beta2: float = 0.999
    """From 0, below 1."""
    eps: float = 1e-8
    """Above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_part("beta1")
        self._check_part("beta2")
        self._check_eps()

    def torch_options(self) -> dict[str, Any]:
        return {"betas": (self.beta1, self.beta2), "eps": self.eps}


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam whose decay is apart from the gradient: ``w <- w - lr weight_decay w``. (Loshchilov, Hutter 2019.)"""

    name = "adamw"
    torch_name = "AdamW"

    weight_decay: float = 0.01


OPTIMIZERS: dict[str, type[Optimizer]] = {kind.name: kind for kind in (SGD, AdaGrad, RMSProp, Adam, AdamW)}


def optimizer_of(value: str | Mapping[str, Any]) -> Optimizer:
    """``"adamw"``, or ``{"sgd": {"momentum": 0.9, "weight_decay": 0.0005}}``.

    Raises:
        ConfigError: no such optimizer or option, or a value that is not allowed.
    """
    return pick(OPTIMIZERS, value, field="optimizer", example="{'sgd': {'momentum': 0.9}}")
