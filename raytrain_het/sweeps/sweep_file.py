"""From a file, or a :class:`SweepConfig`, to a sweep. Everything is checked before anything starts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.jobs import validation
from raytrain_het.jobs.config import JobConfig, plain
from raytrain_het.jobs.job_data import absolute, with_absolute_paths
from raytrain_het.jobs.table import JOBS, build_job, default_job, load_job
from raytrain_het.jobs.validation import plural, yaml_text
from raytrain_het.jobs.yaml_file import apply_overrides, read_yaml
from raytrain_het.plain import nearest
from raytrain_het.sweeps.objective import objective_of
from raytrain_het.sweeps.paths import conflicting, whole_path, with_settings
from raytrain_het.sweeps.search import scheduler_of, search_of
from raytrain_het.sweeps.space import Dimension, dimension
from raytrain_het.sweeps.sweep import JOB, Sweep, SweepConfig

_CHECKED = 2000
"""At most so many combinations of settings are checked for whether they make a job."""


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """A checked sweep from a YAML file, with ``--set`` overrides on top.

    Raises:
        ConfigError: The file or an override is wrong; a line for each mistake, with its path.
    """
    file, overrides = Path(path), list(overrides)
    _check_keys(overrides)
    data = apply_overrides(read_yaml(file, what="sweep", example="space: {alpha: {uniform: [-1, 1]}}"), overrides)

    def source(where: str) -> str:
        for override in reversed(overrides):
            key = override.partition("=")[0].strip()
            if where and (key == where or where.startswith(f"{key}.")):
                return f"--{where}" if where in ("name", "storage") else f"--set {where}"
        return f"{file}: {where}" if where else f"{file}: "

    return _made(validation.build(SweepConfig, data, source=source), file.parent, source)


def _check_keys(overrides: Iterable[str]) -> None:
    """Refuse a job's setting in ``--set``, which ``train`` takes and ``sweep`` does not."""
    known = [f.name for f in dataclasses.fields(SweepConfig)]
    for override in overrides:
        key = override.partition("=")[0].strip().partition(".")[0]
        if "=" in override and key not in known and not nearest(key, known, cutoff=0.75):
            raise ConfigError(
                f"--set {override}: a sweep has no {key!r}; allowed is {', '.join(known)}. For a setting of all its "
                f"trials write --set set.{override}"
            )


def make_sweep(config: SweepConfig) -> Sweep:
    """A checked sweep. Job files are looked for from the working directory.

    Raises:
        ConfigError: The sweep makes no sense; a line for each mistake, with its path.
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
    cls = JOBS[kinds.pop()]
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
            raise ConfigError(f"job={yaml_text(files)} is not valid: two files are called {name!r}. Rename one")
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
                chosen[whole] = absolute(value) if whole in job.path_keys else value
            except ConfigError as error:
                raise ConfigError(f"set.{written}={yaml_text(value)}: {error}") from None
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
    path_keys = cls.path_keys
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
    """Check that search and space fit together, and that every corner of the space makes a job.

    Raises:
        ConfigError: They do not.
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
            said = ", ".join(f"{path}={yaml_text(value)}" for path, value in settings.items())
            raise ConfigError(f"{source('space')}: with {said} there is no job: {error}") from None
        sweep.scheduler.check_epochs(getattr(job, "epochs", 1))
