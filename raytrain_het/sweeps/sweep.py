"""A sweep: the keys of its file, and what follows from them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
import yaml

from raytrain_het.jobs.config import JobConfig, WorkerList, plain
from raytrain_het.jobs.table import JOBS, build_job
from raytrain_het.jobs.validation import RUN_NAME
from raytrain_het.sweeps.objective import Objective
from raytrain_het.sweeps.paths import with_settings
from raytrain_het.sweeps.search import Scheduler, Search
from raytrain_het.sweeps.space import Dimension

JOB = "job"
"""The name of the dimension that chooses between several job files."""
_NUM_TRIALS = 20


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The keys of a sweep's file."""

    space: dict[str, Any]
    """What is varied: by the path of a setting, as ``--set`` takes it (``het.`` can be left out), one of
    ``{uniform: [-1, 1]}``, ``{loguniform: [0.001, 0.1]}``, ``{integers: [1, 8]}`` and ``{logintegers: [1, 1000]}``,
    both with both ends, ``{choice: [step, cosine]}``, and ``{grid: [1, 2, 3]}``, of which every value is tried."""

    metric: str | dict[str, Any]
    """What is looked at: a metric that the job reports (its last value), ``seconds``, ``bytes_sent``, ``samples_per_s``
    or ``fraction_of_aggregate``; or ``{time_to: {accuracy: 0.97}}``, ``{bytes_to: {accuracy: 0.97}}``: a trial ends
    when it is there."""

    mode: Literal["min", "max"] | None = None
    """Whether less or more of the metric is better; ``null`` is what the job says of it."""

    job: str | tuple[str, ...] | None = None
    """The job file, found from the sweep's own folder; ``null`` is the digits. Several are compared."""

    set: dict[str, Any] = field(default_factory=dict)
    """Settings of all trials, by path: ``{epochs: 5}``."""

    workers: WorkerList | None = None
    """The workers of one trial; ``null`` is what the job says."""

    simulate: tuple[Annotated[float, pydantic.Field(gt=0)], ...] | None = None
    """Instead of ``workers``: so many on this machine, slowed down to these relative speeds; one trial at once."""

    search: str | dict[str, dict[str, Any] | None] = "random"
    """``grid`` (every combination), ``random``, or ``optuna``, or one with options:
    ``{optuna: {startup_trials: 10}}``."""

    scheduler: str | dict[str, dict[str, Any] | None] = "none"
    """``none``, or ``asha``, which stops trials early: ``{asha: {grace_epochs: 1, reduction_factor: 3}}``."""

    trials: Annotated[int, pydantic.Field(ge=1)] | None = None
    """How many; ``null`` is about 20, and with ``search: grid`` all there are."""

    max_concurrent: Annotated[int, pydantic.Field(ge=1)] | None = None
    """Most trials at once; ``null`` is as many as the fleet holds."""

    time_budget_s: Annotated[float, pydantic.Field(gt=0)] | None = None
    """Seconds after which the sweep ends as it does after Ctrl-C: what is under way has no value, and ``--resume`` goes
    on, for as many seconds again; ``null`` is no limit."""

    seed: Annotated[int, pydantic.Field(ge=0)] = 0
    """Of the search. That of the trials is ``het.seed``."""

    name: Annotated[str, pydantic.Field(pattern=RUN_NAME)] | None = None
    """The sweep's folder below ``storage``; ``null`` is the file's name and the time of day."""

    storage: Annotated[str, pydantic.Field(min_length=1)] = "sweeps"
    """A folder that all nodes see."""


@dataclass(frozen=True)
class Sweep:
    """A sweep that has been checked. Made by :func:`~raytrain_het.sweeps.load_sweep` and
    :func:`~raytrain_het.sweeps.make_sweep`.

    Raises:
        ConfigError: From those functions: a line for each mistake, with its path.
    """

    config: SweepConfig
    jobs: dict[str, dict[str, Any]]
    """By the file's name: each job's data, with the settings of all trials in it."""
    dimensions: tuple[Dimension, ...]
    objective: Objective
    search: Search
    scheduler: Scheduler

    @property
    def num_trials(self) -> int:
        """How many trials there will be."""
        if not self.search.takes_ranges:
            return math.prod(len(d.choices) for d in self.dimensions)
        every = math.prod(len(d.choices) if d.is_finite else _NUM_TRIALS for d in self.dimensions)
        return self.config.trials or min(every, max(1, round(_NUM_TRIALS / self.num_grid)) * self.num_grid)

    @property
    def num_grid(self) -> int:
        """How many points the grid in the space has."""
        return math.prod(len(d.choices) for d in self.dimensions if d.kind == "grid")

    @property
    def kind(self) -> str:
        """The kind of the jobs."""
        kind: str = next(iter(self.jobs.values()))["kind"]
        return kind

    def param_space(self) -> dict[str, Any]:
        """Ray Tune's space."""
        grid = not self.search.takes_ranges
        return {d.path: d.domain(grid=grid) for d in self.dimensions}

    def data_of(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A trial's data, as a job file would have it, and the paths of settings that have no effect in it."""
        chosen = {d.whole: d.value_of(settings[d.path]) for d in self.dimensions if d.path in settings}
        data = self.jobs[chosen.pop(JOB, next(iter(self.jobs)))]
        data, idle = with_settings(data, chosen)
        return data, [d.path for d in self.dimensions if d.whole in idle]

    def job_of(self, settings: Mapping[str, Any]) -> JobConfig:
        """The job of a trial.

        Args:
            settings: By path, as in the space. The job's own values stand for those that are left out.

        Raises:
            ConfigError: There is no job with these settings.
        """
        return build_job(self.data_of(settings)[0], source=lambda path: path)

    def default_job(self) -> JobConfig:
        """The job without any setting of the space."""
        return self.job_of({})

    def points(self, dimensions: Sequence[Dimension] | None = None) -> Iterator[dict[str, Any]]:
        """All combinations of the dimensions' :meth:`~Dimension.extremes`, of some dimensions or of all."""
        chosen = self.dimensions if dimensions is None else dimensions
        for values in itertools.product(*(d.extremes() for d in chosen)):
            yield dict(zip((d.path for d in chosen), values, strict=True))

    def jobs_by_workers(self) -> list[JobConfig]:
        """A job for each set of workers that a trial may have."""
        varied = [d for d in self.dimensions if d.whole.startswith("workers.") or d.whole == JOB]
        return list({repr(job.workers): job for job in map(self.job_of, self.points(varied))}.values())

    def jobs_by_data(self) -> list[JobConfig]:
        """A job for each set of files that a trial may read."""
        varied = [d for d in self.dimensions if d.whole in JOBS[self.kind].path_keys or d.whole == JOB]
        return list(map(self.job_of, self.points(varied)))

    @property
    def max_epochs(self) -> int:
        """Epochs of the longest trial."""
        varied = [value for d in self.dimensions if d.whole == "epochs" for value in d.extremes()]
        return max(varied or [data.get("epochs", 1) for data in self.jobs.values()])

    def files(self) -> dict[str, str]:
        """By file name, the texts of the resolved sweep and its jobs, which
        :func:`~raytrain_het.sweeps.load_sweep` reads again."""
        jobs = {f"jobs/{name}.yaml": yaml.safe_dump(data, sort_keys=False) for name, data in self.jobs.items()}
        config = plain(dataclasses.asdict(self.config)) | {"job": list(jobs), "set": {}, "workers": None}
        del config["name"], config["storage"], config["time_budget_s"]  # A sweep may be moved, and resumed for longer.
        config["space"] = {**config["space"], **self._absolute()}
        return {"sweep.yaml": yaml.safe_dump(config, sort_keys=False), **jobs}

    def _absolute(self) -> dict[str, Any]:
        named = JOBS[self.kind].path_keys
        return {d.path: {d.kind: list(d.choices.values())} for d in self.dimensions if d.whole in named}
