"""Inside Ray Train: the trainer, the mixed worker group of slots, and what watches a run.

Ray's private modules are imported here only; ``versions`` says for which Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raytrain_het.ray_train import versions  # noqa: F401  (checks Ray before anything of it is used)

if TYPE_CHECKING:
    from raytrain_het.ray_train.failures import TrainFunctionError
    from raytrain_het.ray_train.scaling import HetScalingConfig, WorkerSpec
    from raytrain_het.ray_train.trainer import HetTrainer

__all__ = ["HetScalingConfig", "HetTrainer", "TrainFunctionError", "WorkerSpec"]

_MODULES = {
    "HetTrainer": "trainer",
    "HetScalingConfig": "scaling",
    "WorkerSpec": "scaling",
    "TrainFunctionError": "failures",
}


def __getattr__(name: str) -> Any:
    # Late, since workers import modules of this package and need no trainer there.
    if name in _MODULES:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
