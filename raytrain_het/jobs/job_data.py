"""A job and its data, before any worker is started: are its files there, are they right, does its batch fit them?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from raytrain_het.jobs.config import JobConfig

STEPS_PER_EPOCH = 10
"""A batch size that replaces one larger than the data makes so many steps in an epoch."""
MANY_WORKERS = 64
"""So many workers get a sample each where ``workers: auto`` leaves their number open."""


def check_data(job: JobConfig) -> list[str]:
    """Check a job's data, as far as the job can tell before it runs.

    Returns:
        Warnings, a line each.

    Raises:
        ConfigError: The data is not there, or is not what the job needs.
    """
    warnings = job.check_data()
    batch = _fitting_batch(job)
    if batch is not None:
        warnings.append(
            f"global_batch_size={_batch(job)} is more than the {job.num_samples()} samples to train on: {batch} are "
            f"taken, so that an epoch has several steps. Another number: --set global_batch_size={batch}"
        )
    return warnings


def with_fitting_batch(job: JobConfig) -> JobConfig:
    """The job, with a tenth of its samples in a batch if a batch is larger than the data.

    With all samples in one batch an epoch would be one step, and would hardly train. The data has been checked.
    """
    batch = _fitting_batch(job)
    fields: dict[str, Any] = {"global_batch_size": batch}
    return job if batch is None else dataclasses.replace(job, **fields)


def with_absolute_paths(job: JobConfig) -> JobConfig:
    """The job with the files that it names found from any working directory. URIs stay as they are."""
    named = {key: getattr(job, key) for key in job.path_keys}
    paths: dict[str, Any] = {key: absolute(path) for key, path in named.items() if path is not None}
    return dataclasses.replace(job, **paths) if paths else job


def absolute(path: str | None) -> str | None:
    """A path that is found from any working directory. A URI, and None, stay as they are."""
    return str(Path(path).expanduser().resolve()) if path is not None and "://" not in path else path


def _fitting_batch(job: JobConfig) -> int | None:
    """Another batch size than the job's; None where its own is no larger than the data."""
    samples, batch = job.num_samples(), _batch(job)
    if samples is None or batch is None or batch <= samples:
        return None
    # Nobody knows yet how many workers `auto` will find; each needs a sample.
    least = job.num_workers or min(samples, MANY_WORKERS)
    fitting = max(least, samples // STEPS_PER_EPOCH)
    return fitting if fitting != batch else None


def _batch(job: JobConfig) -> int | None:
    return getattr(job, "global_batch_size", None)
