"""What a training function prepares, one thing after the other, before its worker joins the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from raytrain_het.config import HetConfig
from raytrain_het.errors import LoopOrderError
from raytrain_het.worker.checks.codec_warnings import warnings_of_optimizer
from raytrain_het.worker.checks.losses import LossCheck
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.data.data_plan import DataPlan
from raytrain_het.worker.state.extras import Extras
from raytrain_het.worker.state.registered import RegisteredState
from raytrain_het.worker.state.structure import parameters_outside
from raytrain_het.worker.step.optimizer import OptimizerUpdate
from raytrain_het.worker.step.trained import trained

logger = logging.getLogger("raytrain_het")


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What the prepared loader says of its data."""

    plan: DataPlan
    """The order of samples, and the batches."""
    micro_batch_size: int | None = None
    """Most samples of one pass; None is no limit."""
    fingerprint: str = ""
    """The dataset's, where it has one."""
    loss: LossCheck = field(default_factory=lambda: LossCheck("mean", weighed=False))
    """What the program says of its loss."""
    collate_fn: Callable[[list[Any]], Any] | None = None
    """The loader's, where it is not torch's default."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that a worker joins with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    update: OptimizerUpdate
    data: TrainingData
    registered: RegisteredState
    extras: Extras


class Draft:
    """One worker's, until it joins.

    Args:
        config: the run's settings.
        extras: what checkpoints hold besides.
    """

    def __init__(self, config: HetConfig, extras: Extras) -> None:
        self.warnings: list[str] = []
        """For the run's log."""
        self._config, self._extras = config, extras
        self._model: nn.Module | None = None
        self._optimizer: tuple[torch.optim.Optimizer, OptimizerUpdate] | None = None
        self._data: TrainingData | None = None
        self._registered = RegisteredState()
        self._guards: list[Any] = []

    def set_model(self, model: nn.Module) -> None:
        """Keep the model; its gradients are refused until the worker joins."""
        if self._model is not None:
            raise refuse("second model")
        self._guards = [p.register_post_accumulate_grad_hook(_refuse_backward) for _, p in trained(model)]
        self._model = model

    def set_optimizer(self, optimizer: torch.optim.Optimizer, update: OptimizerUpdate) -> None:
        """Keep the optimizer and its own step."""
        if self._optimizer is not None:
            raise refuse("second optimizer")
        self._check_parameters(optimizer)
        self.warn(warnings_of_optimizer, optimizer)
        self._optimizer = optimizer, update

    def set_data(self, data: TrainingData) -> None:
        """Keep what the loader says."""
        if self._data is not None:
            raise refuse("second loader")
        self._data = data

    def register_state(self, name: str, obj: Any) -> None:
        """See :func:`raytrain_het.register_state`."""
        self._registered.add(name, obj)

    def has_registered(self, name: str, obj: Any) -> bool:
        """Whether this very object has this name."""
        return self._registered.objects.get(name) is obj

    def missing(self) -> list[str]:
        """The functions that were not called yet, in the order in which they are."""
        there = (
            ("prepare_model()", self._model),
            ("prepare_optimizer()", self._optimizer),
            ("prepare_data_loader()", self._data),
        )
        return [name for name, value in there if value is None]

    def complete(self) -> Prepared:
        """The worker joins: from here on gradients belong to steps.

        Raises:
            LoopOrderError: something is not prepared yet, or does not go together.
        """
        model, optimizer, data = self._model, self._optimizer, self._data
        if model is None or optimizer is None or data is None:
            raise LoopOrderError(
                f"loader.epochs() was called before {self.missing()[0]}: prepare model and optimizer first."
            )
        self._check_parameters(optimizer[0])
        self._check_scheduler(optimizer[0])
        self.close()
        return Prepared(
            model=model,
            optimizer=optimizer[0],
            update=optimizer[1],
            data=data,
            registered=self._registered,
            extras=self._extras,
        )

    def warn(self, warnings: Callable[[Any, tuple[str, ...], Any], list[str]], of: Any) -> None:
        """Say what is to be said of the codecs in view of ``of``, here and later in the run's log."""
        for text in warnings(self._config.compression, self._config.possible_codecs, of):
            logger.warning(text)
            self.warnings.append(text)

    def close(self) -> None:
        """Take the hooks off the model."""
        for guard in self._guards:
            guard.remove()

    def _check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        if self._model is not None and (outside := parameters_outside(self._model, optimizer)):
            more = f", and {len(outside) - 1} more" if len(outside) > 1 else ""
            raise refuse("parameters outside", outside[0] + more)

    def _check_scheduler(self, optimizer: torch.optim.Optimizer) -> None:
        registered = self._registered.objects.values()
        schedulers = [o for o in registered if isinstance(o, torch.optim.lr_scheduler.LRScheduler)]
        if hasattr(getattr(optimizer, "step", None), "_wrapped_by_lr_sched") and not schedulers:
            raise LoopOrderError(
                "a learning-rate scheduler is attached to the optimizer but not registered, so it would count a step "
                "that is done again twice: call raytrain_het.register_state('scheduler', scheduler) before "
                "loader.epochs()."
            )
        if schedulers and self._config.schedule is not None:
            raise LoopOrderError(
                f"the run has schedule={self._config.schedule!r}, and a {type(schedulers[0]).__name__} is registered "
                "too: both would set the learning rate. Use one of them."
            )


def _refuse_backward(_: torch.Tensor) -> None:
    raise LoopOrderError(
        "backward() was called outside of a step, before loader.epochs(): take a batch from the prepared loader first "
        "(for x, y in loader: ...), one backward() and one optimizer.step() for each."
    )
