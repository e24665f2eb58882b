"""A sweep's folder: where it is, and whether a sweep can begin or resume there. Checked before Ray is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from raytrain_het.errors import ConfigError
from raytrain_het.jobs import ray_session
from raytrain_het.jobs.runner import check_writable
from raytrain_het.jobs.validation import yaml_text
from raytrain_het.jobs.yaml_file import read_yaml
from raytrain_het.sweeps.sweep import Sweep

SWEEP = "sweep.yaml"


def check_before_ray(sweep: Sweep, *, name: str, resume: bool, address: str | None) -> Path:
    """Check what can be checked before Ray is loaded, which takes seconds; returns the sweep's folder.

    Raises:
        ConfigError: As :func:`folder_of`; or nothing listens at the address, or a trial's data is not there.
    """
    folder = folder_of(sweep, name, resume=resume)
    ray_session.check_before_ray(address)
    for job in sweep.jobs_by_data():
        job.glance_at_data()
    return folder


def folder_of(sweep: Sweep, name: str, *, resume: bool) -> Path:
    """The folder of a sweep.

    Raises:
        ConfigError: It cannot be written, or holds a sweep already, or has no sweep to resume.
    """
    if "://" in sweep.config.storage:
        raise ConfigError(
            f"--storage {sweep.config.storage}: a sweep's folder is read and written by all its trials: allowed is a "
            "folder that all nodes share. Write --storage sweeps"
        )
    storage = Path(sweep.config.storage).expanduser().resolve()
    check_writable(storage)
    folder = storage / (sweep.config.name or name)
    if resume:
        _check_resume(sweep, folder)
    elif folder.exists() and any(folder.iterdir()):
        fix = "--resume to go on with it, or another --name" if (folder / SWEEP).exists() else "another --name"
        raise ConfigError(f"{folder} is there already. Write {fix}")
    return folder


def sweeps_in(storage: Path) -> list[str]:
    """The names of the sweeps in a folder."""
    return sorted(path.parent.name for path in storage.expanduser().glob(f"*/{SWEEP}"))


def _check_resume(sweep: Sweep, folder: Path) -> None:
    if not (folder / SWEEP).exists():
        there = sweeps_in(folder.parent)
        hint = f"--name with one of {', '.join(there)}" if there else "the same without --resume"
        raise ConfigError(f"--resume: there is no sweep in {folder}. Write {hint}")
    for file, text in sweep.files().items():
        before, now = read_yaml(folder / file), _loaded(text)
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"--resume: {folder / file} has {key}: {yaml_text(before.get(key))}, now it is "
                    f"{yaml_text(now.get(key))}. "
                    "Write it as it was, or another --name without --resume"
                )


def _loaded(text: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(text)
    return data
