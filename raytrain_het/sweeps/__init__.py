"""Sweeps: Ray Tune over a job's settings, each trial a whole run on workers of its own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrain_het.sweeps.driver import make_tuner, run_sweep
    from raytrain_het.sweeps.results import Results, read_results
    from raytrain_het.sweeps.runs import run_name
    from raytrain_het.sweeps.sweep import Sweep, SweepConfig
    from raytrain_het.sweeps.sweep_file import load_sweep, make_sweep
    from raytrain_het.sweeps.trial import trainable

__all__ = [
    "Results",
    "Sweep",
    "SweepConfig",
    "load_sweep",
    "make_sweep",
    "make_tuner",
    "read_results",
    "run_name",
    "run_sweep",
    "trainable",
]

# Loaded when first used: a sweep's file is checked without Ray and pandas, which take seconds.
_HOME = {
    "Results": "results",
    "Sweep": "sweep",
    "SweepConfig": "sweep",
    "load_sweep": "sweep_file",
    "make_sweep": "sweep_file",
    "make_tuner": "driver",
    "read_results": "results",
    "run_name": "runs",
    "run_sweep": "driver",
    "trainable": "trial",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
