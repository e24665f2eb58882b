"""From a checked job to a finished run."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.display import Display
from raytrain_het.jobs.ray_session import ray_session
from raytrain_het.jobs.table import check_data, train_function


class Interrupted(Exception):
    """The run was ended by a signal.

    Args:
        exit_code: What the process should end with: 128 and the signal's number.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


AtStart = Callable[[int], None]
"""Called in a worker, with its world rank, before the training function; picklable."""


def run_job(
    job: JobConfig, *, display: Display, address: str | None = None, at_start: AtStart | None = None
) -> dict[str, Any]:
    """Run a job to its end and return its summary, the object of ``--json``.

    Args:
        at_start: What each worker does first, one that fills a place again too.

    Raises:
        ConfigError: The job cannot run here; nothing was started.
        Interrupted: Ctrl-C or SIGTERM; the workers are gone.
    """
    job = resolve(job)
    check_data(job)
    folder = f"{job.storage}/{job.name}"
    started = False

    def on_update(
        status: Mapping[str, Any], events: Sequence[Mapping[str, Any]], reports: Sequence[Mapping[str, Any]]
    ) -> None:
        nonlocal started
        if not started:
            # Not before the run is on: one that cannot start leaves nothing behind.
            started = True
            _write_job(job)
            display.say(f"run folder: {folder}")
        display.on_update(status, events, reports)

    with display, _interruptible():
        with ray_session(address, num_cpus=_num_cpus(job)):
            trainer = _trainer(job, on_update, at_start)
            trainer.fit()
        display.finish(trainer.summary, folder)
    return dict(trainer.summary)


def resolve(job: JobConfig) -> JobConfig:
    """The job with its name and its storage settled.

    Raises:
        ConfigError: The storage is a local path that cannot be written.
    """
    storage = job.storage
    if "://" not in storage:
        storage = str(Path(storage).expanduser().resolve())
        check_writable(Path(storage))
    return dataclasses.replace(job, name=job.name or _free_name(job.kind, storage), storage=storage)


def check_writable(storage: Path) -> None:
    """Refuse a folder that no run could write to, without creating it.

    Raises:
        ConfigError: It is not a folder, or it is read-only.
    """
    nearest = next(path for path in (storage, *storage.parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"storage={str(storage)!r}: {nearest} is a file: allowed is a folder. Write --storage runs")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"storage={str(storage)!r} cannot be written: {nearest} is read-only for this user: allowed is a folder "
            "you may write to. Write --storage ~/runs"
        )


def _free_name(kind: str, storage: str) -> str:
    name = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (name if i == 1 else f"{name}-{i}" for i in range(1, 1000))
    return next(n for n in names if not os.path.exists(os.path.join(storage, n)))


def _write_job(job: JobConfig) -> None:
    """The resolved job beside what the trainer writes: ``raytrain-het train <folder>/job.yaml`` goes on with it."""
    assert job.name is not None
    if "://" not in job.storage:
        (Path(job.storage) / job.name / "job.yaml").write_text(job.to_yaml(), encoding="utf-8")


def _num_cpus(job: JobConfig) -> float:
    if isinstance(job.workers, str):
        return 1
    return math.fsum(spec.count * spec.resources.get("CPU", 0) for spec in job.workers)


@dataclass(frozen=True)
class _Prepared:
    """A training function that does something else first."""

    at_start: AtStart
    train_fn: Callable[[dict[str, Any]], None]

    def __call__(self, config: dict[str, Any]) -> None:
        import ray.train

        self.at_start(ray.train.get_context().get_world_rank())
        self.train_fn(config)


def _trainer(job: JobConfig, on_update: Any, at_start: AtStart | None) -> Any:
    import ray.train

    import raytrain_het as het

    workers: Any = job.workers
    if not isinstance(workers, str):
        workers = [het.WorkerSpec(**dataclasses.asdict(spec)) for spec in workers]
    train_fn = train_function(job.kind)
    return het.HetTrainer(
        train_fn if at_start is None else _Prepared(at_start, train_fn),
        train_loop_config=job.train_loop_config(),
        het_config=job.het,
        scaling_config=het.HetScalingConfig(workers=workers),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=job.storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=job.keep_checkpoints),
        ),
        on_update=on_update,
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn every way in which a signal ends a run into ``Interrupted``.

    Ray Train puts a handler of its own in place while it runs, which aborts the controller and then
    leaves by ``sys.exit(0)``; Ray's for SIGTERM leaves by ``sys.exit(15)``.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(128 + signal.SIGINT) from None
    except SystemExit as leave:
        # By way of Ray's Ctrl-C handler the status is 0 or 1, and says nothing.
        raise Interrupted(128 + (signal.SIGTERM if leave.code == signal.SIGTERM else signal.SIGINT)) from None
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
