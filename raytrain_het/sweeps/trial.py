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
"""How long a run may take to end, once it is told to."""
_POLL_S = 1.0


class Run:
    """A trainer's ``fit`` in a thread, and its reports as they come.

    Args:
        make: Takes an ``on_update``, returns a :class:`raytrain_het.HetTrainer`.
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
            self._trainer.abort()  # Again and again: a trainer that has not begun has nothing to abort yet.
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
    """A trial whose steps are the rows of a run's reports. It ends with the run."""

    _run: Run | None = None

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Tune's hook: as little as can be asked for, since workers reserve for themselves."""
        return tune.PlacementGroupFactory([{"memory": 1.0}])

    def setup(self, config: dict[str, Any]) -> None:
        """Tune's hook for a new trial."""
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Tune's hook for the next trial in this process."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, settings: dict[str, Any]) -> None:
        self._settings, self._run = dict(settings), None
        self._rows = self._results()

    def step(self) -> dict[str, Any]:
        """Tune's hook for a step: the next row. After the last one the trial is done."""
        row = next(self._rows, None)
        return {RESULT_DUPLICATE: True, DONE: True} if row is None else row

    def cleanup(self) -> None:
        """Tune's hook for the end: stop the run, if it has not ended."""
        if self._run is not None:
            self._run.stop()
            self._run = None
        self._rows.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing is saved: the run's folder has everything."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See :meth:`save_checkpoint`."""

    @abc.abstractmethod
    def _results(self) -> Generator[dict[str, Any], None, None]:
        """The rows of the trial's run. The run begins when the first row is asked for."""


def trainable(make_trainer: Callable[[dict[str, Any]], Any]) -> type[tune.Trainable]:
    """A trainable for ``ray.tune.Tuner`` that sweeps a training function of your own.

    Each report becomes a result: the metrics, averaged over workers, and the figures of
    :class:`~raytrain_het.sweeps.runs.Rows`.

    Args:
        make_trainer: Takes a trial's settings, returns its :class:`raytrain_het.HetTrainer`. Name each run with
            ``RunConfig(name=run_name(settings))``: then every trial has a run of its own, and an interrupted one
            resumes.
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
    """A sweep's job with a trial's settings. ``tune.with_parameters`` gives ``sweep``, ``folder``, ``at_once`` and
    ``at_start``.

    The rows that the run's folder already holds come first. So an interrupted trial resumes with its run, and an ended
    trial is not run again.
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
        if told and told[-1]["epoch"] == epochs and not outcome:  # Killed before it wrote the outcome.
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
                last = row  # Yielded when everything is stored, since Tune may end the trial at once.
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
        """Write down that the trial is complete if this row reaches the target, before Tune ends the trial; returns the
        row."""
        if self._sweep.objective.reached(row) and not read_outcome(self._folder):
            write_outcome(self._folder, status="complete")
        return row

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Wait until this trial may run.

        Trials with the same settings share a run: the second waits, and then takes the first one's rows. And no more
        trials run at once than fit on the cluster: a resumed search would start as many as fitted when it began.
        """
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
