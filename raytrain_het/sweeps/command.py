"""The command ``raytrain-het sweep``: it runs a checked sweep and prints the results."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain_het.errors import ConfigError
from raytrain_het.jobs import lines
from raytrain_het.jobs.trainer import AtStart
from raytrain_het.sweeps.folders import check_before_ray, sweeps_in
from raytrain_het.sweeps.sweep import Sweep

if TYPE_CHECKING:
    from raytrain_het.sweeps.results import Results


def run_sweep(sweep: Sweep, **options: Any) -> Results:
    """:func:`raytrain_het.sweeps.driver.run_sweep`, which loads Ray Tune. That takes seconds, so a typo is
    refused before."""
    from raytrain_het.sweeps.driver import run_sweep as run

    return run(sweep, **options)


def sweep_command(
    sweep: Sweep,
    *,
    file: str,
    resume: bool,
    retry_failed: bool,
    address: str | None,
    as_json: bool,
    at_start: AtStart | None = None,
) -> int:
    """Run a sweep and print the results.

    Returns:
        The exit status: 1 if all trials have ended and none has a value, else 0.

    Raises:
        ConfigError, ResourceError, Interrupted: As :func:`~raytrain_het.sweeps.driver.run_sweep`.
    """
    if resume and sweep.config.name is None:
        there = sweeps_in(Path(sweep.config.storage))
        raise ConfigError(
            f"--resume needs the name of the sweep; in {sweep.config.storage} there {'are' if there else 'is'} "
            f"{', '.join(there) or 'none'}. Write --name {there[0] if there else 'mine'}, or --storage"
        )
    name = f"{Path(file).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_before_ray(sweep, name=name, resume=resume, address=address)
    results = run_sweep(
        sweep,
        name=name,
        resume=resume,
        address=address,
        at_start=at_start,
        retry_failed=retry_failed,
        to_stderr=as_json,
    )
    stream = sys.stderr if as_json else sys.stdout
    lines.print_tables(results.table(lines.columns(stream)), stream)
    where = results.folder
    if results.best is None:
        none = "no trial has a value" if sweep.objective.target is None else "no trial has reached the target"
        lines.print_text(f"{none}: see {where / 'trials.csv'}", stream)
    else:
        lines.print_text(f"all trials and epochs: {where}/trials.parquet, epochs.parquet (and .csv)", stream)
        lines.print_text(f"the best again: raytrain-het train {where / 'best.yaml'}", stream)
    if as_json:
        print(results.to_json(), flush=True)
    return 0 if results.best is not None or not results.is_finished else 1
