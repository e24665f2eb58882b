"""Sweeps: Ray Tune over a job's settings, each trial a whole run on workers of its own."""

from __future__ import annotations

from raytrain_het.sweeps.driver import make_tuner, run_sweep
from raytrain_het.sweeps.results import Results, read_results
from raytrain_het.sweeps.runs import run_name
from raytrain_het.sweeps.sweep import Sweep, SweepConfig
from raytrain_het.sweeps.sweep_file import load_sweep, make_sweep
from raytrain_het.sweeps.trial import trainable

__all__ = [
    "Results", "Sweep", "SweepConfig", "load_sweep", "make_sweep", "make_tuner", "read_results", "run_name",
    "run_sweep", "trainable",
]  # fmt: skip
