"""From a checked job to a finished run."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raytrain_het.errors import CheckpointError, ConfigError
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.display import Display
from raytrain_het.jobs.interrupted import Interrupted, interruptible
from raytrain_het.jobs.job_data import check_data, with_absolute_paths, with_fitting_batch
from raytrain_het.jobs.ray_session import check_before_ray, is_local, ray_session
from raytrain_het.jobs.trainer import AtStart, make_trainer, num_cpus, write_job
from raytrain_het.jobs.validation import plural, yaml_text
from raytrain_het.jobs.yaml_file import read_yaml
from raytrain_het.probing.cores import cpu_limit
from raytrain_het.ray_train.disk import write_some

if TYPE_CHECKING:
    from raytrain_het.ray_train.run_folder import LastCheckpoint

Status = Mapping[str, Any]
Events = Sequence[Mapping[str, Any]]


def run_job(
    job: JobConfig, *, display: Display, address: str | None = None, at_start: AtStart | None = None
) -> dict[str, Any]:
    """Run a job to its end and return its summary, the object of ``--json``.

    Args:
        at_start: Called in each worker before its training function, also in one that refills a slot.

    Raises:
        ConfigError: The job cannot run here; nothing was started.
        Interrupted: Ctrl-C or SIGTERM; the workers are gone.
    """
    # Checks that need neither torch nor Ray come first: to load them takes seconds, and a typo should not wait.
    job = resolve(job)
    check_before_ray(address)
    job.glance_at_data()
    check_reuse(job)
    notes = check_data(job)
    job = with_fitting_batch(job)
    if "://" in job.storage:
        _check_remote(job)

    folder = f"{job.storage}/{job.run_name}"
    last = _last_checkpoint(job)
    about = {"name": job.name, "run_folder": folder}
    epochs = getattr(job, "epochs", None)
    if last is not None and epochs is not None and last.epoch >= epochs:
        summary = about | _of_complete_run(last)
        display.end_at_once(
            summary,
            f"{job.name} is complete ({last.epoch} of {epochs} epochs): nothing left to do.\n"
            f"More epochs: --set epochs={2 * last.epoch}; afresh: another --name\nlast checkpoint: {last.path}",
        )
        return summary
    on_update = _telling_its_start(job, display, folder, last)
    try:
        with display, interruptible():
            for note in (*notes, *_crowded(job, address)):
                display.say(note)
            with ray_session(address, num_cpus=num_cpus(job)):
                trainer = make_trainer(job, on_update, at_start)
                trainer.fit()
            summary = about | trainer.summary
            display.finish(summary, folder)
    except Interrupted as end:
        last = _last_checkpoint(job)
        end.hint = f"; the same command with --name {job.name} goes on from {last}" if last is not None else ""
        raise
    return summary


def _telling_its_start(
    job: JobConfig, display: Display, folder: str, last: LastCheckpoint | None
) -> Callable[[Status, Events, Events], None]:
    """The function that is called at each update. At the first one it writes the job's file: a run that cannot start
    leaves nothing behind."""
    started = False

    def on_update(status: Status, events: Events, reports: Events) -> None:
        nonlocal started
        if not started:
            started = True
            try:
                write_job(job)
            except OSError as error:
                display.say(f"{folder}/job.yaml could not be written ({error}); the run goes on")
            display.say(f"run folder: {folder}")
            if last is not None:
                display.say(f"resumed from {last}")
        display.on_update(status, events, reports)

    return on_update


def _last_checkpoint(job: JobConfig) -> LastCheckpoint | None:
    """The checkpoint that a run of this name resumes from."""
    if "://" not in job.storage and not (Path(job.storage) / job.run_name).is_dir():
        return None  # Ray need not be loaded yet: it is, later, while the display counts the seconds.

    from raytrain_het.ray_train.run_folder import last_checkpoint_of

    return last_checkpoint_of(job.storage, job.run_name)


def _of_complete_run(last: LastCheckpoint) -> dict[str, Any]:
    return {
        "metrics": last.metrics,
        "steps": last.step,
        "checkpoint": last.path,
        "num_checkpoints_failed": 0,
        "resumed_from": last.path,
        "workers": [],
    }


def _crowded(job: JobConfig, address: str | None) -> list[str]:
    cores = cpu_limit().cores
    if job.num_workers is None or not is_local(address) or num_cpus(job) <= cores:
        return []
    return [f"{plural(job.num_workers, 'worker')} on {cores:.3g} core{'' if cores == 1 else 's'}: they share them"]


def resolve(job: JobConfig) -> JobConfig:
    """The job with its name, its storage and its files settled.

    Raises:
        ConfigError: The storage is a local path that cannot be written.
    """
    storage = job.storage
    if "://" not in storage:
        storage = str(Path(storage).expanduser().resolve())
        check_writable(Path(storage))
    job = with_absolute_paths(job)
    return dataclasses.replace(job, name=job.name or _free_name(job.kind, storage), storage=storage)


def check_writable(storage: Path) -> None:
    """Refuse a folder that no run could write to, or on a full disk, without creating it.

    Raises:
        ConfigError: It is not a folder, or some KiB cannot be written there.
    """
    nearest = next(path for path in (storage, *storage.parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"storage={str(storage)!r}: {nearest} is a file: allowed is a folder. Write --storage runs")
    try:
        write_some(nearest)
    except OSError as error:
        what = (
            "the disk is full: free some space"
            if error.errno == errno.ENOSPC
            else (f"nothing can be written in {nearest} ({error.strerror}): allowed is a folder you may write to")
        )
        raise ConfigError(f"--storage {storage}: {what}. Write --storage ~/runs") from None


def _check_remote(job: JobConfig) -> None:
    import ray.train

    from raytrain_het.ray_train.storage import check_writable as storage_of

    try:
        storage_of(ray.train.RunConfig(name=job.name, storage_path=job.storage))
    except CheckpointError as error:
        cause = (str(error.__cause__).strip().splitlines() or ["unknown"])[0]
        raise ConfigError(
            f"--storage {job.storage} cannot be written: {cause} Allowed is a folder, or a URI such as "
            "s3://bucket/runs whose library is installed. Write --storage runs"
        ) from None


def check_reuse(job: JobConfig) -> None:
    """Refuse a name whose earlier run this job cannot resume, before anything of that run is overwritten.

    Raises:
        ConfigError: The earlier run is of another kind, of another model or optimizer, or of a script.
    """
    folder = Path(job.storage) / job.run_name
    if "://" in job.storage or not folder.is_dir():
        return
    has_checkpoint = _last_checkpoint(job) is not None
    try:
        before = read_yaml(folder / "job.yaml")
    except ConfigError:
        if has_checkpoint:
            raise ConfigError(
                f"{folder} has checkpoints of a run that was not started from a job file. Write another --name"
            ) from None
        return
    if before.get("kind") != job.kind:
        raise ConfigError(
            f"{folder} is a {before.get('kind')!r} run, this job is {job.kind!r}: a run goes on with its own kind "
            "only. Write another --name"
        )
    now = yaml.safe_load(job.to_yaml())
    for data in (before, now):
        data["het.seed"] = (data.get("het") or {}).get("seed", 0)  # The order of samples follows from it.
    reasons = dict.fromkeys((*job.model_keys, "het.seed"), "its checkpoints do not fit")
    reasons |= dict.fromkeys(job.optimizer_keys, "its checkpoints hold the old one and would bring it back")
    for key, reason in reasons.items() if has_checkpoint else ():
        if key in before and before[key] != now[key]:
            raise ConfigError(
                f"{folder} is a run with {key}={yaml_text(before[key])}, this job has {key}={yaml_text(now[key])}: "
                f"{reason}. "
                f"Write another --name, or {key} as it was"
            )


def _free_name(kind: str, storage: str) -> str:
    name = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (name if i == 1 else f"{name}-{i}" for i in range(1, 1000))
    return next(n for n in names if not os.path.exists(os.path.join(storage, n)))
