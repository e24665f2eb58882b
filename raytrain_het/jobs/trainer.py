"""From a checked job to its trainer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain_het.jobs.config import JobConfig

AtStart = Callable[[int], None]
"""Called in a worker, with its world rank, before the training function; picklable."""


def write_job(job: JobConfig) -> None:
    """Write the resolved job into the run's folder: ``raytrain-het train <folder>/job.yaml`` resumes the run."""
    from raytrain_het.files import write_whole

    if "://" not in job.storage:
        write_whole(Path(job.storage) / job.run_name / "job.yaml", job.to_yaml())


def num_cpus(job: JobConfig) -> float:
    """CPUs that a job's workers reserve together."""
    if isinstance(job.workers, str):
        return 1
    return math.fsum(spec.count * spec.resources.get("CPU", 0) for spec in job.workers)


@dataclass(frozen=True)
class _TrainFn:
    """A job's training function. What it imports takes seconds to load, and is loaded in workers alone."""

    job: type[JobConfig]
    at_start: AtStart | None

    def __call__(self, config: dict[str, Any]) -> None:
        import ray.train

        if self.at_start is not None:
            self.at_start(ray.train.get_context().get_world_rank())
        self.job.train(config)


def scaling_of(job: JobConfig) -> Any:
    """The :class:`raytrain_het.HetScalingConfig` of a job."""
    import raytrain_het as het

    if isinstance(job.workers, str):
        return het.HetScalingConfig(workers="auto")
    return het.HetScalingConfig(workers=[het.WorkerSpec(**dataclasses.asdict(spec)) for spec in job.workers])


def make_trainer(job: JobConfig, on_update: Any = None, at_start: AtStart | None = None) -> Any:
    """The :class:`raytrain_het.HetTrainer` of a job that has been resolved."""
    import ray.train

    import raytrain_het as het

    return het.HetTrainer(
        _TrainFn(type(job), at_start),
        train_loop_config=job.train_loop_config(),
        het_config=job.het,
        scaling_config=scaling_of(job),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=job.storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=job.keep_checkpoints),
        ),
        on_update=on_update,
    )
