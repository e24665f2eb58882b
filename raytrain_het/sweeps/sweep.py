"""A sweep: what a file says, checked as a whole before anything starts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from raytrain_het.errors import ConfigError
from raytrain_het.jobs import validation
from raytrain_het.jobs.config import JobConfig, WorkerList, plain
from raytrain_het.jobs.table import (
    KINDS,
    absolute,
    build_job,
    config_class,
    default_job,
    load_job,
    with_absolute_paths,
)
from raytrain_het.jobs.validation import RUN_NAME, plural, shown
from raytrain_het.jobs.yaml_file import apply_overrides, read_yaml
from raytrain_het.sweeps.objective import Objective, objective_of
from raytrain_het.sweeps.paths import conflicting, whole_path, with_settings
from raytrain_het.sweeps.search import Scheduler, Search, scheduler_of, search_of
from raytrain_het.sweeps.space import Dimension, dimension

JOB = "job"
"""The dimension of a sweep over several job files."""
_NUM_TRIALS = 20
_CHECKED = 2000
"""So many combinations are tried at most, to see whether they make a job."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What a sweep's file says."""

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

    seed: Annotated[int, pydantic.Field(ge=0)] = 0
    """Of the search. That of the trials is ``het.seed``."""

    name: Annotated[str, pydantic.Field(pattern=RUN_NAME)] | None = None
    """The sweep's folder below ``storage``; ``null`` is the file's name and the time of day."""

    storage: Annotated[str, pydantic.Field(min_length=1)] = "sweeps"
    """A folder that all nodes see."""


@dataclass(frozen=True)
class Sweep:
    """A sweep that has been checked. Made by :func:`load_sweep` and :func:`make_sweep`.

    Raises:
        ConfigError: from those: every mistake with the path of what is wrong.
    """

    config: SweepConfig
    jobs: dict[str, dict[str, Any]]
    """By the name of the file: what each job says, with what the sweep sets for all trials."""
    dimensions: tuple[Dimension, ...]
    objective: Objective
    search: Search
    scheduler: Scheduler

    @property
    def num_trials(self) -> int:
        """How many there will be."""
        if not self.search.takes_ranges:
            return math.prod(len(d.choices) for d in self.dimensions)
        return self.config.trials or max(1, round(_NUM_TRIALS / self.num_grid)) * self.num_grid

    @property
    def num_grid(self) -> int:
        """Points of the grid in the space."""
        return math.prod(len(d.choices) for d in self.dimensions if d.kind == "grid")

    @property
    def kind(self) -> str:
        """Of the job."""
        kind: str = next(iter(self.jobs.values()))["kind"]
        return kind

    def param_space(self) -> dict[str, Any]:
        """Ray Tune's."""
        grid = not self.search.takes_ranges
        return {d.path: d.domain(grid=grid) for d in self.dimensions}

    def data_of(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What the job file of a trial would say, and the settings that count for nothing in it, as written."""
        chosen = {d.whole: d.value_of(settings[d.path]) for d in self.dimensions if d.path in settings}
        data = self.jobs[chosen.pop(JOB, next(iter(self.jobs)))]
        data, idle = with_settings(data, chosen)
        return data, [d.path for d in self.dimensions if d.whole in idle]

    def job_of(self, settings: Mapping[str, Any]) -> JobConfig:
        """The job of a trial.

        Args:
            settings: by path, as in the space. Those that are left out are the job's own.

        Raises:
            ConfigError: the settings make no job.
        """
        return build_job(self.data_of(settings)[0], source=lambda path: path)

    def default_job(self) -> JobConfig:
        """The job without any setting of the space."""
        return self.job_of({})

    def points(self, dimensions: Sequence[Dimension] | None = None) -> Iterator[dict[str, Any]]:
        """Settings at the ends of all ranges and within them, and for all choices; of some dimensions, or all."""
        chosen = self.dimensions if dimensions is None else dimensions
        for values in itertools.product(*(d.extremes() for d in chosen)):
            yield dict(zip((d.path for d in chosen), values, strict=True))

    def jobs_by_workers(self) -> list[JobConfig]:
        """A job for each set of workers that a trial may have."""
        varied = [d for d in self.dimensions if d.whole.startswith("workers.") or d.whole == JOB]
        return list({repr(job.workers): job for job in map(self.job_of, self.points(varied))}.values())

    @property
    def max_epochs(self) -> int:
        """Of the longest trial."""
        varied = [value for d in self.dimensions if d.whole == "epochs" for value in d.extremes()]
        return max(varied or [data.get("epochs", 1) for data in self.jobs.values()])

    def files(self) -> dict[str, str]:
        """The sweep and its jobs, resolved, as files that :func:`load_sweep` reads again: by the name of the file."""
        jobs = {f"jobs/{name}.yaml": yaml.safe_dump(data, sort_keys=False) for name, data in self.jobs.items()}
        config = plain(dataclasses.asdict(self.config)) | {"job": list(jobs), "set": {}, "workers": None}
        del config["name"], config["storage"]  # It may be moved.
        config["space"] = {**config["space"], **self._absolute()}
        return {"sweep.yaml": yaml.safe_dump(config, sort_keys=False), **jobs}

    def _absolute(self) -> dict[str, Any]:
        named = KINDS[self.kind].path_keys
        return {d.path: {d.kind: list(d.choices.values())} for d in self.dimensions if d.whole in named}


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """A checked sweep from a YAML file, with ``--set`` overrides on top.

    Raises:
        ConfigError: the file or an override is wrong; a line for each mistake, with its path.
    """
    file, overrides = Path(path), list(overrides)
    data = apply_overrides(read_yaml(file, what="sweep", example="space: {alpha: {uniform: [-1, 1]}}"), overrides)

    def source(where: str) -> str:
        for override in reversed(overrides):
            key = override.partition("=")[0].strip()
            if where and (key == where or where.startswith(f"{key}.")):
                return f"--{where}" if where in ("name", "storage") else f"--set {where}"
        return f"{file}: {where}" if where else f"{file}: "

    return _made(validation.build(SweepConfig, data, source=source), file.parent, source)


def make_sweep(config: SweepConfig) -> Sweep:
    """A checked sweep. Job files are looked for from the working directory.

    Raises:
        ConfigError: it makes no sense; a line for each mistake, with its path.
    """
    given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    return _made(validation.build(SweepConfig, plain(given)), Path(), str)


def _made(config: SweepConfig, folder: Path, source: Callable[[str], str]) -> Sweep:
    jobs = _jobs(config, folder)
    kinds = {data["kind"] for data in jobs.values()}
    if len(kinds) > 1:
        raise ConfigError(
            f"{source('job')}: the jobs are of the kinds {' and '.join(sorted(kinds))}: one sweep compares jobs of one "
            "kind. Write one of them"
        )
    cls = config_class(kinds.pop())
    problems: list[str] = []
    dimensions = list(_dimensions(config, cls, jobs, source, problems))
    found: dict[str, Any] = {}
    for name, make in {
        "search": lambda: search_of(config.search),
        "scheduler": lambda: scheduler_of(config.scheduler),
        "objective": lambda: objective_of(
            config.metric, config.mode, build_job(next(iter(jobs.values())), source=str).metrics()
        ),
    }.items():
        try:
            found[name] = make()
        except ConfigError as error:
            problems.append(f"{source('')}{error}")
    if problems:
        raise ConfigError("\n".join(problems))
    sweep = Sweep(config, jobs, tuple(dimensions), **found)
    _check(sweep, source)
    return sweep


def _jobs(config: SweepConfig, folder: Path) -> dict[str, dict[str, Any]]:
    files = [config.job] if isinstance(config.job, str) else list(config.job or [None])
    jobs: dict[str, dict[str, Any]] = {}
    for file in files:
        path = default_job() if file is None else Path(file).expanduser()
        path = path if path.is_absolute() else folder / path
        name = path.stem
        if name in jobs:
            raise ConfigError(f"job={shown(files)} is not valid: two files are called {name!r}. Rename one")
        job = with_absolute_paths(load_job(path))
        data = {key: value for key, value in plain(dataclasses.asdict(job)).items() if key != "name"}
        if config.workers is not None:
            data["workers"] = plain(
                config.workers if isinstance(config.workers, str) else [dataclasses.asdict(w) for w in config.workers]
            )
        if config.simulate is not None:
            data["workers"] = [{"count": len(config.simulate), "resources": {"CPU": 1.0}}]
        chosen = {}
        for written, value in config.set.items():
            try:
                whole = whole_path(type(job), written)
                chosen[whole] = absolute(value) if whole in KINDS[job.kind].path_keys else value
            except ConfigError as error:
                raise ConfigError(f"set.{written}={shown(value)}: {error}") from None
        jobs[name] = with_settings(data, chosen)[0]
        build_job(jobs[name], source=lambda where: f"set, in the job {where}")
    return jobs


def _dimensions(
    config: SweepConfig,
    cls: type[JobConfig],
    jobs: Mapping[str, Any],
    source: Callable[[str], str],
    problems: list[str],
) -> Iterator[Dimension]:
    if len(jobs) > 1:
        kind = "choice" if config.search == "optuna" or "optuna" in config.search else "grid"
        yield Dimension(path=JOB, whole=JOB, kind=kind, choices={name: name for name in jobs})
    wholes: dict[str, str] = {}
    path_keys = KINDS[next(iter(jobs.values()))["kind"]].path_keys
    for path, written in config.space.items():
        where = f"{source('space')}.{path}"
        try:
            whole = whole_path(cls, path)
        except ConfigError as error:
            problems.append(f"{where}: {error}")
            continue
        if whole in wholes:
            problems.append(f"{where}: the same setting is there as {wholes[whole]!r}. Leave one out")
            continue
        wholes[whole] = path
        try:
            found = dimension(path, whole, written)
            if whole in path_keys:
                found = dataclasses.replace(found, choices={k: absolute(v) for k, v in found.choices.items()})
            yield found
        except ConfigError as error:
            problems.append(f"{where}{error}")
    clash = conflicting(wholes)
    if clash is not None:
        field_, kinds = clash
        short = field_.removeprefix("het.")
        problems.append(
            f"{source('space')}: options of {' and '.join(kinds)} are varied, and nothing chooses between them. Write "
            f"{short}: {{choice: [{', '.join(kinds)}]}} too"
        )
    if not config.space and len(jobs) == 1:
        problems.append(
            f"{source('space')}={{}} is empty: nothing is varied. Write space: {{alpha: {{uniform: [-1, 1]}}}}"
        )


def _check(sweep: Sweep, source: Callable[[str], str]) -> None:
    """That search and space fit together, and that every corner of the space makes a job.

    Raises:
        ConfigError: they do not.
    """
    search, config = sweep.search, sweep.config
    for d in sweep.dimensions:
        if not search.takes_ranges and not d.is_finite:
            raise ConfigError(
                f"{source('space')}.{d.path}: search='grid' tries every value, and a range has no end of them. Write "
                f"{d.path}: {{grid: [{d.low:g}, {d.high:g}]}}, or search: random"
            )
        if not search.takes_grids and d.kind == "grid":
            raise ConfigError(
                f"{source('space')}.{d.path}: search={search.name!r} draws, it does not try every value. Write "
                f"choice instead of grid, or search: random"
            )
    if all(d.is_finite for d in sweep.dimensions):
        every = math.prod(len(d.choices) for d in sweep.dimensions)
        if not search.takes_ranges and config.trials not in (None, every):
            raise ConfigError(
                f"{source('trials')}={config.trials} is not valid: search='grid' tries all {every} combinations. Leave "
                "it out, or write search: random"
            )
        if config.trials is not None and config.trials > every:
            raise ConfigError(
                f"{source('trials')}={config.trials} is not valid: there are {every} combinations. Write search: grid"
            )
    if search.takes_ranges and config.trials is not None and config.trials % sweep.num_grid:
        nearest = max(1, round(config.trials / sweep.num_grid)) * sweep.num_grid
        raise ConfigError(
            f"{source('trials')}={config.trials} is not valid: every value of a grid is tried with what is drawn, so "
            f"allowed is a multiple of the grid's {plural(sweep.num_grid, 'point')}. Write trials: {nearest}"
        )
    first = next(sweep.points())
    each = [first | {d.path: value} for d in sweep.dimensions for value in d.extremes()]
    for settings in itertools.chain(each, itertools.islice(sweep.points(), _CHECKED)):
        try:
            job = sweep.job_of(settings)
        except ConfigError as error:
            said = ", ".join(f"{path}={shown(value)}" for path, value in settings.items())
            raise ConfigError(f"{source('space')}: with {said} there is no job: {error}") from None
        sweep.scheduler.check_epochs(getattr(job, "epochs", 1))
