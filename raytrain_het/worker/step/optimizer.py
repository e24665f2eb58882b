"""An optimizer whose ``step()`` closes the step.

Its class is replaced by a subclass, so that it stays what it was to others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from raytrain_het.errors import LoopOrderError
from raytrain_het.worker.checks.unsupported import refuse

if TYPE_CHECKING:
    from raytrain_het.worker.session import Session


def make_het(optimizer: torch.optim.Optimizer, session: Session) -> Callable[[], Any]:
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

    checked = False

    def update(optimizer: torch.optim.Optimizer, **options: Any) -> Any:
        # A fused optimizer takes a loss scaler's factor off by itself, later.
        scale = getattr(optimizer, "grad_scale", None)
        session.clip_gradients(1.0 if scale is None else float(scale))
        session.updating = True
        try:
            return cls.step(optimizer, **options)
        finally:
            session.updating = False

    def step(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None, **options: Any) -> Any:
        if closure is not None:
            raise refuse("closure")
        if session.engine is None:
            raise LoopOrderError(
                "optimizer.step() was called before loader.epochs(): use for epoch in loader.epochs(n)."
            )
        nonlocal checked
        if not checked:
            checked = True
            _check_scaler(_calling_scaler(), session)
        return session.engine.close(lambda: update(self, **options))

    # Torch wraps the step of a class that it has not wrapped yet, in load_state_dict() too: hooks would run twice.
    step.hooked = True  # type: ignore[attr-defined]
    members = {
        "step": step,
        "__module__": __name__,
        "__reduce_ex__": lambda self, _: (_plain, (cls, self.__getstate__())),
    }
    optimizer.__class__ = type(f"Het{cls.__name__}", (cls,), members)
    return lambda: update(optimizer)


def _plain(cls: type[torch.optim.Optimizer], state: dict[str, Any]) -> torch.optim.Optimizer:
    """A copy of a prepared optimizer, pickled or deep: of its own class, which takes no part in the run."""
    copy = cls.__new__(cls)
    copy.__setstate__(state)
    return copy


def _calling_scaler() -> torch.amp.GradScaler | None:
    """The loss scaler on whose behalf ``step()`` was called, if any: torch has nowhere to ask for it."""
    frame = sys._getframe(1)
    for _ in range(6):  # This module's step(), perhaps a learning-rate scheduler's wrapper, and the scaler's methods.
        if frame.f_back is None:
            break
        frame = frame.f_back
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.amp.GradScaler):
            return caller
    return None


def _check_scaler(scaler: torch.amp.GradScaler | None, session: Session) -> None:
    if scaler is not None and scaler.is_enabled() and session.replica.scaler is not scaler:
        raise LoopOrderError(
            "the loss is scaled by a GradScaler that the run does not know, so workers with different scales would be "
            "averaged as they are: call het.register_state('scaler', scaler) before loader.epochs()."
        )
    model = session.replica.model
    if scaler is not None and scaler.is_enabled() and model is not None:
        halves = [name for name, p in model.named_parameters() if p.dtype == torch.float16]
        if halves:
            raise LoopOrderError(
                f"a GradScaler with parameters in float16 ({halves[0]!r}, ...): their scaled gradients overflow on one "
                "worker and not on another. Keep the parameters in float32 and use torch.autocast."
            )
