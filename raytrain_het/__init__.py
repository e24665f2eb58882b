"""Train one PyTorch model on unequal machines, through failures and joins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raytrain_het.config import HetConfig
from raytrain_het.training.user import (
    evaluate,
    num_participants,
    prepare_data_loader,
    prepare_model,
    prepare_optimizer,
    register_state,
    report,
)

if TYPE_CHECKING:
    from raytrain_het.ray_train import HetScalingConfig, HetTrainer, WorkerSpec

__all__ = [
    "HetConfig",
    "HetScalingConfig",
    "HetTrainer",
    "WorkerSpec",
    "evaluate",
    "num_participants",
    "prepare_data_loader",
    "prepare_model",
    "prepare_optimizer",
    "register_state",
    "report",
]


def __getattr__(name: str) -> Any:
    # The driver's side loads Ray Train, which a worker process has no need of.
    if name in ("HetScalingConfig", "HetTrainer", "WorkerSpec"):
        from raytrain_het import ray_train

        return getattr(ray_train, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
