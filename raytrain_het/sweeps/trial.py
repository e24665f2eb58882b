"""One trial: a whole run on workers of its own, as a Ray Tune ``Trainable`` whose steps are the run's reports."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from ray import tune
from ray.tune.result import DONE, RESULT_DUPLICATE

from raytrain_het.jobs.failure import describe
from raytrain_het.jobs.job_data import with_fitting_batch
from raytrain_het.jobs.trainer import AtStart, make_trainer, write_job
from raytrain_het.sweeps.runs import (
    Rows,
    add_lost_report,
    read_outcome,
    read_reports,
    rows_of,
    run_name,
    write_outcome,
)
from raytrain_het.sweeps.search import FOR_SCHEDULER, FOR_SEARCH
from raytrain_het.sweeps.sweep import Sweep

STOP_S = 30.0
"""How long a run that is to end may take for it."""
_POLL_S = 1.0


class Run:
    """A trainer's ``fit`` in a thread, and its reports as they come.

    Args:
        make: From an ``on_update`` to a :class:`raytrain_het.HetTrainer`.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._trainer = make(self._on_update)
        self._ended = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="het-trial", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Reports, until the run is over."""
        return iter(self._reports.get, None)

    def stop(self) -> None:
        """End it, and wait until its processes are gone."""
        deadline = time.monotonic() + STOP_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._ended = True
            self._trainer.abort()  # What has not begun yet has nothing to end.
            self._thread.join(0.2)

    def _fit(self) -> None:
        try:
            if not self._ended:
                self._trainer.fit()
        except BaseException as error:
            self.error = error
        self._reports.put(None)

    def _on_update(self, status: Any, events: Any, reports: Any) -> None:
        for report in reports:
            self._reports.put(report)


class RunTrial(tune.Trainable, abc.ABC):
    """A trial whose steps are rows of a run's reports, and which ends with the run."""

    _run: Run | None = None

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Tune's: next to nothing, since workers reserve for themselves. Nothing at all cannot be asked for."""
        return tune.PlacementGroupFactory([{"memory": 1.0}])

    def setup(self, config: dict[str, Any]) -> None:
        """Tune's: a new trial."""
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Tune's: the next trial in this process."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, settings: dict[str, Any]) -> None:
        self._settings, self._run = dict(settings), None
        self._rows = self._results()

    def step(self) -> dict[str, Any]:
        """Tune's: the next row. After the last one the trial is done."""
        row = next(self._rows, None)
        return {RESULT_DUPLICATE: True, DONE: True} if row is None else row

    def cleanup(self) -> None:
        """Tune's: end the run, if it goes on."""
        if self._run is not None:
            self._run.stop()
            self._run = None
        self._rows.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run's folder has all."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See :meth:`save_checkpoint`."""

    @abc.abstractmethod
    def _results(self) -> Generator[dict[str, Any], None, None]:
        """The rows of the trial's run, which begins with the first."""


def trainable(make_trainer: Callable[[dict[str, Any]], Any]) -> type[tune.Trainable]:
    """What a ``ray.tune.Tuner`` runs to sweep a training function of your own.

    Each report becomes a result: the metrics, averaged over workers, and the figures of
    :class:`~raytrain_het.sweeps.runs.Rows`.

    Args:
        make_trainer: From a trial's settings to its :class:`raytrain_het.HetTrainer`. Trials have runs of their own:
            ``RunConfig(name=run_name(settings))`` names them, and one that is interrupted goes on.
    """

    class TrainerTrial(RunTrial):
        def _results(self) -> Generator[dict[str, Any], None, None]:
            def make(on_update: Any) -> Any:
                trainer = make_trainer(self._settings)
                trainer.on_update = on_update
                return trainer

            rows = Rows()
            self._run = run = Run(make)
            yield from map(rows.add, run)
            if run.error is not None:
                raise tune.TuneError(describe(run.error))

    return TrainerTrial


class Trial(RunTrial):
    """A sweep's job with a trial's settings. ``sweep``, ``folder``, ``at_once`` and ``at_start`` come by
    ``tune.with_parameters``.

    Whatever the folder of its run holds already is told first, so that a trial that was interrupted goes on where its
    run does, and one that has ended before is not run again.
    """

    def setup(
        self,
        config: dict[str, Any],
        sweep: Sweep | None = None,
        folder: str = "",
        at_once: int = 1,
        at_start: AtStart | None = None,
    ) -> None:
        assert sweep is not None
        self._sweep, self._root, self._at_once, self._at_start = sweep, folder, at_once, at_start
        super().setup(config)

    def _results(self) -> Generator[dict[str, Any], None, None]:
        self._folder = Path(self._root) / "runs" / run_name(self._settings)
        self._told: list[dict[str, Any]] = []
        objective = self._sweep.objective
        with self._in_turn():
            try:
                for row in self._all_rows():
                    self._told.append(row)
                    yield row | {
                        FOR_SEARCH: objective.for_search(self._told),
                        FOR_SCHEDULER: objective.for_scheduler(row),
                    }
            except Exception as error:
                if not read_outcome(self._folder):
                    write_outcome(self._folder, status="failed", error=describe(error))
                raise

    def _all_rows(self) -> Iterator[dict[str, Any]]:
        job = self._sweep.job_of(self._settings)
        job = dataclasses.replace(job, name=self._folder.name, storage=str(self._folder.parent))
        epochs = getattr(job, "epochs", None)
        reports, outcome = read_reports(self._folder), read_outcome(self._folder)
        add_lost_report(self._folder, reports)
        told = rows_of(reports)
        if told and told[-1]["epoch"] == epochs and not outcome:  # Killed between its end and word of it.
            outcome = {"status": "complete"}
            write_outcome(self._folder, **outcome)
        for row in told:
            yield self._noting_an_end(row)
            if self._sweep.objective.reached(row):
                return
        if outcome.get("status") == "failed":
            raise tune.TuneError(outcome["error"])
        if outcome:
            return
        job = with_fitting_batch(job)
        write_job(job)
        rows = Rows()
        for report in reports:
            rows.add(report)
        self._run = run = Run(lambda on_update: make_trainer(job, on_update, self._at_start))
        last = None
        for report in run:
            row = rows.add(report)
            if row["epoch"] == epochs:
                last = row  # Told when all is stored: who hears of it may end the trial.
                continue
            yield self._noting_an_end(row)
            if self._sweep.objective.reached(row):
                return
        self._run = None
        if run.error is not None:
            raise run.error
        write_outcome(self._folder, status="complete")
        if last is not None:
            yield last

    def _noting_an_end(self, row: dict[str, Any]) -> dict[str, Any]:
        """A trial that is where it was to get is complete, whatever is made of its report."""
        if self._sweep.objective.reached(row) and not read_outcome(self._folder):
            write_outcome(self._folder, status="complete")
        return row

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Trials with the same settings are one run: the second waits, and takes what the first has found. And no more
        run at once than fit: a search that goes on remembers what fitted when it began."""
        self._folder.mkdir(parents=True, exist_ok=True)
        slots = (Path(self._root) / f".slot_{k}" for k in range(self._at_once))
        with _one_free([self._folder / ".lock"]), _one_free(slots):
            yield


@contextlib.contextmanager
def _one_free(files: Iterable[Path]) -> Iterator[None]:
    """Hold one of these locks, the first that is free. The kernel releases it when the process ends."""
    locks = [FileLock(file, thread_local=False) for file in files]
    while (held := next(filter(_is_acquired, locks), None)) is None:
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        held.release()


def _is_acquired(lock: BaseFileLock) -> bool:
    """Acquire a lock if it is free; returns whether it was."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True
