"""The kinds of jobs, and job files -> JobConfig. A new job is one new file and one line in KINDS."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain_het.errors import ConfigError
from raytrain_het.jobs import validation
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.yaml_file import apply_overrides, read_yaml

if TYPE_CHECKING:
    from raytrain_het.jobs.training_step import TrainingStep


STEPS_PER_EPOCH = 10
"""With a batch that is chosen since the one that was asked for is larger than the data."""
MANY_WORKERS = 64


@dataclass(frozen=True, kw_only=True)
class JobKind:
    """One built-in job."""

    config: str
    """Where its JobConfig is, as ``module:name``."""

    train_fn: str
    """Where its training function is. Apart from the configuration, so that checking a job file
    needs neither torch nor Ray."""

    make_step: str
    """A function that makes the job's training step: from the training function's config and a device to a
    :class:`~raytrain_het.jobs.training_step.TrainingStep`."""

    requires: tuple[str, ...] = ()
    """Modules of the extra ``jobs`` that it imports."""

    model_keys: tuple[str, ...] = ()
    """Fields that change the model or the samples: a run of the same name cannot go on with others."""

    optimizer_keys: tuple[str, ...] = ()
    """Fields that are part of the optimizer's state, which a run that goes on takes from its checkpoint."""

    path_keys: tuple[str, ...] = ()
    """Fields that name a file, or a URI. Workers have other working directories: a path is made absolute."""

    glance: str | None = None
    """A function that takes the job and sees whether its data is there at all, in a moment, without torch and Ray."""

    check: str | None = None
    """A function that takes the job and looks at its data before any worker is started, without torch and Ray. It
    returns what there is to warn of, a line each."""

    num_samples: str | None = None
    """A function that takes a job whose data was checked, to the number of samples that it trains on."""


KINDS: dict[str, JobKind] = {
    "digits": JobKind(
        config="raytrain_het.jobs.digits_config:DigitsJob",
        train_fn="raytrain_het.jobs.digits:train_digits",
        make_step="raytrain_het.jobs.digits:make_step",
        requires=("sklearn",),
        optimizer_keys=("lr", "optimizer"),
        num_samples="raytrain_het.jobs.digits_config:num_samples",
    ),
    "tabular": JobKind(
        config="raytrain_het.jobs.tabular_config:TabularJob",
        train_fn="raytrain_het.jobs.tabular:train_tabular",
        make_step="raytrain_het.jobs.tabular:make_step",
        model_keys=("task", "model", "hidden", "data", "target", "features", "columns", "rows"),
        optimizer_keys=("lr", "optimizer", "l1", "l2"),
        path_keys=("data",),
        glance="raytrain_het.jobs.tabular_check:glance",
        check="raytrain_het.jobs.tabular_check:check",
        num_samples="raytrain_het.jobs.tabular_check:num_samples",
    ),
    "char_lm": JobKind(
        config="raytrain_het.jobs.char_lm_config:CharLMJob",
        train_fn="raytrain_het.jobs.char_lm:train_char_lm",
        make_step="raytrain_het.jobs.char_lm:make_step",
        model_keys=("context", "layers", "heads", "width", "max_characters"),
        optimizer_keys=("lr", "optimizer"),
        check="raytrain_het.jobs.char_lm_text:check",
        num_samples="raytrain_het.jobs.char_lm_text:num_samples",
    ),
}


def default_job() -> Path:
    """The job file that is used when none is named: a wheel carries a copy of the checkout's."""
    packaged = Path(str(resources.files("raytrain_het.jobs") / "digits.yaml"))
    checkout = Path(__file__).resolve().parents[2] / "experiments" / "jobs" / "digits.yaml"
    for path in (packaged, checkout):
        if path.is_file():
            return path
    raise ConfigError(f"the default job is neither at {packaged} nor at {checkout}. Install again, or name a job file")


def load_job(path: str | Path | None = None, overrides: Iterable[str] = ()) -> JobConfig:
    """A checked job from a YAML file with ``--set`` overrides on top.

    Raises:
        ConfigError: The file or an override is wrong; the message names the place, the value
            received, what is allowed and the fix.
    """
    file = Path(path) if path is not None else default_job()
    overrides = list(overrides)
    return build_job(read_job(file, overrides), source=lambda where: _source(file, overrides, where))


def build_job(data: dict[str, Any], *, source: Callable[[str], str]) -> JobConfig:
    """A checked job from what its file says.

    Args:
        data: as read from YAML.
        source: Says where a dotted path was written, for the messages.

    Raises:
        ConfigError: it is wrong; as :func:`load_job`.
    """
    kind = data.get("kind")
    if kind is None:
        raise ConfigError(f"{source('kind')} is missing: allowed is {_names()}. Write kind: digits")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{source('kind')}={kind!r} is not valid: allowed is {_names()}.")
    missing = [name for name in KINDS[kind].requires if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the job {kind!r} needs {', '.join(missing)}, which is not installed. "
            "Write: python -m pip install 'raytrain-het[jobs]'"
        )
    return validation.build(config_class(kind), data, source=source)


def with_absolute_paths(job: JobConfig) -> JobConfig:
    """The job with the files that it names found from any working directory. URIs stay as they are."""
    named = {key: getattr(job, key) for key in KINDS[job.kind].path_keys}
    paths: dict[str, Any] = {key: absolute(path) for key, path in named.items() if path is not None}
    return dataclasses.replace(job, **paths) if paths else job


def absolute(path: str | None) -> str | None:
    """A file that is found from any working directory. URIs, and none, stay as they are."""
    return str(Path(path).expanduser().resolve()) if path is not None and "://" not in path else path


def read_job(path: str | Path | None = None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a job file says, with overrides on top, before it is checked.

    Raises:
        ConfigError: It cannot be read, or an override has no place in it.
    """
    return apply_overrides(read_yaml(path if path is not None else default_job()), overrides)


def train_function(kind: str) -> Callable[[dict[str, Any]], None]:
    """The training function of a kind of job."""
    function: Callable[[dict[str, Any]], None] = _import(KINDS[kind].train_fn)
    return function


def make_step(kind: str, config: dict[str, Any], device: Any) -> TrainingStep:
    """The training step of a kind of job, on a ``torch.device``.

    Args:
        kind: a name in KINDS.
        config: what the training function is given.
        device: where it runs.
    """
    step: TrainingStep = _import(KINDS[kind].make_step)(config, device)
    return step


def check_data(job: JobConfig) -> list[str]:
    """Look at a job's data, as far as its kind can tell beforehand; returns what there is to warn of.

    Raises:
        ConfigError: The data is not there, or is not what the job needs.
    """
    check = KINDS[job.kind].check
    notes = list(_import(check)(job)) if check is not None else []
    batch = _fitting_batch(job)
    if batch is not None:
        notes.append(
            f"global_batch_size={_batch(job)} is more than the {_num_samples(job)} samples to train on: {batch} are "
            f"taken, so that an epoch has several steps. Another number: --set global_batch_size={batch}"
        )
    return notes


def glance_at_data(job: JobConfig) -> None:
    """See whether a job's data is there at all, and has the columns that it names: in a moment.

    Raises:
        ConfigError: It is not.
    """
    for key in KINDS[job.kind].path_keys:
        path = getattr(job, key)
        # Here already, for the sake of what a look into the file would load.
        if path is not None and "://" not in path and not Path(path).expanduser().exists():
            raise ConfigError(f"{key}={path!r} does not exist: allowed is a CSV or Parquet file. Look at its path.")
    glance = KINDS[job.kind].glance
    if glance is not None:
        _import(glance)(job)


def with_fitting_batch(job: JobConfig) -> JobConfig:
    """The job, with a tenth of its samples in a batch if they are fewer than a batch: one step an epoch would hardly
    train. The data has been checked."""
    batch = _fitting_batch(job)
    fields: dict[str, Any] = {"global_batch_size": batch}
    return job if batch is None else dataclasses.replace(job, **fields)


def _fitting_batch(job: JobConfig) -> int | None:
    """Another batch size than the job's; None where its own is no larger than the data."""
    samples, batch = _num_samples(job), _batch(job)
    if samples is None or batch is None or batch <= samples:
        return None
    # How many workers `auto` will find is not known yet; each needs a sample.
    least = job.num_workers or min(samples, MANY_WORKERS)
    fitting = max(least, samples // STEPS_PER_EPOCH)
    return fitting if fitting != batch else None


def _batch(job: JobConfig) -> int | None:
    return getattr(job, "global_batch_size", None)


def _num_samples(job: JobConfig) -> int | None:
    count = KINDS[job.kind].num_samples
    return None if count is None else int(_import(count)(job))


def config_class(kind: str) -> type[JobConfig]:
    """The dataclass of a kind of job."""
    config: type[JobConfig] = _import(KINDS[kind].config)
    return config


def _source(file: Path, overrides: list[str], where: str) -> str:
    """Where a key was written: on the command line, if an override reaches it, else in the file."""
    for override in reversed(overrides):
        key = override.partition("=")[0].strip()
        if where and (key == where or where.startswith(f"{key}.")):
            return f"--{where}" if where in ("name", "storage") else f"--set {where}"
    return f"{file}: {where}" if where else f"{file}: "


def _names() -> str:
    return " or ".join(repr(name) for name in KINDS)


def _import(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
