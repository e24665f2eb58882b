"""All jobs, and job files as jobs. A new job is one file or folder, and one line in the table."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.jobs import validation
from raytrain_het.jobs.char_lm.job import CharLMJob
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.digits.job import DigitsJob
from raytrain_het.jobs.tabular.job import TabularJob
from raytrain_het.jobs.yaml_file import apply_overrides, read_yaml

JOBS: dict[str, type[JobConfig]] = {
    job.kind: job
    for job in (
        DigitsJob,
        TabularJob,
        CharLMJob,
    )
}
"""By what a job file has as its ``kind``."""


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
    if not isinstance(kind, str) or kind not in JOBS:
        raise ConfigError(f"{source('kind')}={kind!r} is not valid: allowed is {_names()}.")
    missing = [name for name in JOBS[kind].requires if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the job {kind!r} needs {', '.join(missing)}, which is not installed. "
            "Write: python -m pip install 'raytrain-het[jobs]'"
        )
    return validation.build(JOBS[kind], data, source=source)


def read_job(path: str | Path | None = None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a job file says, with overrides on top, before it is checked.

    Raises:
        ConfigError: It cannot be read, or an override has no place in it.
    """
    return apply_overrides(read_yaml(path if path is not None else default_job()), overrides)


def _source(file: Path, overrides: list[str], where: str) -> str:
    """Where a key was written: on the command line, if an override reaches it, else in the file."""
    for override in reversed(overrides):
        key = override.partition("=")[0].strip()
        if where and (key == where or where.startswith(f"{key}.")):
            return f"--{where}" if where in ("name", "storage") else f"--set {where}"
    return f"{file}: {where}" if where else f"{file}: "


def _names() -> str:
    return " or ".join(repr(name) for name in JOBS)
