"""Train one PyTorch model on unequal machines, through failures and joins."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrain_het.allreduce.ddp_hook import CompressedState, compressed_hook
    from raytrain_het.config import HetConfig
    from raytrain_het.ray_train import HetScalingConfig, HetTrainer, WorkerSpec
    from raytrain_het.worker.user import (
        evaluate,
        num_participants,
        prepare_data_loader,
        prepare_model,
        prepare_optimizer,
        register_state,
        report,
    )

__all__ = [
    "CompressedState",
    "HetConfig",
    "HetScalingConfig",
    "HetTrainer",
    "WorkerSpec",
    "compressed_hook",
    "evaluate",
    "num_participants",
    "prepare_data_loader",
    "prepare_model",
    "prepare_optimizer",
    "register_state",
    "report",
]

# Loaded when first used: torch and Ray take seconds, which `raytrain-het --help` and a misspelt
# job file need not, and a worker process of the step protocol needs no Ray at all.
_HOME = {
    "CompressedState": "raytrain_het.allreduce.ddp_hook",
    "compressed_hook": "raytrain_het.allreduce.ddp_hook",
    "HetConfig": "raytrain_het.config",
    "HetScalingConfig": "raytrain_het.ray_train",
    "HetTrainer": "raytrain_het.ray_train",
    "WorkerSpec": "raytrain_het.ray_train",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME.get(name, "raytrain_het.worker.user")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
