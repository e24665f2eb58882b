"""An optimizer whose ``step()`` closes the step.

Its class is replaced by a subclass, so that it stays what it was to others.
"""

from __future__ import annotations

import inspect
import itertools
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from raytrain_het.config import HetConfig
from raytrain_het.errors import LoopOrderError
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.step.clipping import Clipping

if TYPE_CHECKING:
    from raytrain_het.worker.session import Session


class OptimizerUpdate:
    """The step of an optimizer's own class, after the run's clipping: an update of this run, or one that is replayed.

    Args:
        optimizer: whose; of its own class still.
        config: says how gradients are clipped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: HetConfig) -> None:
        self._optimizer, self._step = optimizer, type(optimizer).step
        self._clipping = Clipping(**config.clip) if config.clip else None
        self.num_clipped = 0
        """Updates before which there was something to clip."""
        self.under_way = False
        """The optimizer may take the steps of others that it wraps meanwhile."""

    def __call__(self, **options: Any) -> Any:
        self._clip()
        self.under_way = True
        try:
            return self._step(self._optimizer, **options)
        finally:
            self.under_way = False

    def _clip(self) -> None:
        if self._clipping is None:
            return
        # A fused optimizer takes a loss scaler's factor off by itself, later: until then gradients are so much larger.
        scale = getattr(self._optimizer, "grad_scale", None)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self.num_clipped += self._clipping.clip(parameters, 1.0 if scale is None else float(scale))


def make_het(optimizer: torch.optim.Optimizer, session: Session) -> OptimizerUpdate:
    """Turn the optimizer into one of ours, in place; returns its own ``step``."""
    cls = type(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise LoopOrderError(f"prepare_optimizer() got a {cls.__name__}: pass a torch.optim.Optimizer.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise refuse("LBFGS")
    if "step" in vars(optimizer):
        raise LoopOrderError(
            "prepare_optimizer() must come before the learning-rate scheduler: prepare the optimizer, then make the "
            "scheduler from it, then register_state('scheduler', scheduler)."
        )

    update, checked = OptimizerUpdate(optimizer, session.config), False

    def step(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None, **options: Any) -> Any:
        if closure is not None:
            raise refuse("closure")
        worker = session.joined("optimizer.step()", "use for epoch in loader.epochs(n).")
        nonlocal checked
        if not checked:
            checked = True
            _check_scaler(_calling_scaler(), worker.replica)
        return worker.engine.close(lambda: update(**options))

    # Torch wraps the step of a class that it has not wrapped yet, in load_state_dict() too: hooks would run twice.
    step.hooked = True  # type: ignore[attr-defined]
    members = {
        "step": step,
        "__module__": __name__,
        "__reduce_ex__": lambda self, _: (_plain, (cls, self.__getstate__())),
    }
    optimizer.__class__ = type(f"Het{cls.__name__}", (cls,), members)
    return update


def _plain(cls: type[torch.optim.Optimizer], state: dict[str, Any]) -> torch.optim.Optimizer:
    """A copy of a prepared optimizer, pickled or deep: of its own class, which takes no part in the run."""
    copy = cls.__new__(cls)
    copy.__setstate__(state)
    return copy


def _calling_scaler() -> torch.amp.GradScaler | None:
    """The loss scaler on whose behalf ``step()`` was called, if any: torch has nowhere to ask for it."""
    # The first of these frames are this module's, perhaps a scheduler's wrapper, and the scaler's own methods.
    for frame, _ in itertools.islice(traceback.walk_stack(inspect.currentframe()), 7):
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.amp.GradScaler):
            return caller
    return None


def _check_scaler(scaler: torch.amp.GradScaler | None, replica: Replica) -> None:
    if scaler is not None and scaler.is_enabled() and replica.registered.scaler is not scaler:
        raise LoopOrderError(
            "the loss is scaled by a GradScaler that the run does not know, so workers with different scales would be "
            "averaged as they are: call het.register_state('scaler', scaler) before loader.epochs()."
        )
    if scaler is not None and scaler.is_enabled():
        halves = [name for name, p in replica.named_parameters() if p.dtype == torch.float16]
        if halves:
            raise LoopOrderError(
                f"a GradScaler with parameters in float16 ({halves[0]!r}, ...): their scaled gradients overflow on one "
                "worker and not on another. Keep the parameters in float32 and use torch.autocast."
            )
