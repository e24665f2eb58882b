"""The checks of `raytrain-het probe` that come before torch and Ray are loaded, which takes seconds."""

from __future__ import annotations

import os

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.job_data import with_absolute_paths
from raytrain_het.jobs.ray_session import check_before_ray


def check_before_torch(job: JobConfig | None, *, address: str | None, compression: bool) -> JobConfig | None:
    """The job, with absolute paths of its files.

    Raises:
        ConfigError: ``compression`` is asked for without a job; or the cluster or the job's data is not there.
    """
    if compression and job is None:
        raise ConfigError("--compression predicts steps of a job: add --model JOB.yaml")
    if address or os.environ.get("RAY_ADDRESS"):
        check_before_ray(address)
    if job is not None:
        job = with_absolute_paths(job)
        job.glance_at_data()
    return job
