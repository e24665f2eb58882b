"""From a checked sweep to its results: it runs Ray Tune's ``Tuner``."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import cloudpickle

from raytrain_het.errors import ConfigError
from raytrain_het.files import write_whole
from raytrain_het.jobs.interrupted import Interrupted, interruptible
from raytrain_het.jobs.job_data import check_data
from raytrain_het.jobs.lines import print_text
from raytrain_het.jobs.ray_session import ray_session
from raytrain_het.jobs.trainer import AtStart, num_cpus, scaling_of
from raytrain_het.jobs.validation import plural
from raytrain_het.sweeps.folders import SWEEP, check_before_ray
from raytrain_het.sweeps.ledger import FILE as LEDGER
from raytrain_het.sweeps.ledger import Book, Ledger, open_ledger, read_ledger
from raytrain_het.sweeps.results import Results, read_results
from raytrain_het.sweeps.runs import OUTCOME
from raytrain_het.sweeps.sweep import Sweep
from raytrain_het.sweeps.time_budget import TimeBudget

TUNE = "tune"
"""Ray Tune's own folder, below the sweep's."""
_ENVIRONMENT = {
    # A killed driver loses what Tune has not saved yet, and searches for it again.
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Tune's tables name a folder that does not stay.
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_sweep(
    sweep: Sweep,
    *,
    name: str,
    resume: bool = False,
    address: str | None = None,
    at_start: AtStart | None = None,
    retry_failed: bool = False,
    to_stderr: bool = False,
) -> Results:
    """Run a sweep to its end.

    Args:
        sweep: From :func:`~raytrain_het.sweeps.load_sweep` or :func:`~raytrain_het.sweeps.make_sweep`.
        name: The name of its folder, unless the sweep has a name.
        resume: Whether to resume the interrupted sweep of this name.
        address: A Ray cluster, as for ``raytrain-het train``.
        at_start: Called in each worker before its training function.
        retry_failed: With ``resume``: whether failed trials are tried again.
        to_stderr: Whether lines for people go to stderr instead of stdout.

    Returns:
        The results, which are also written into the folder. If the time budget is used up, some trials are unfinished
        or have not begun (:attr:`~raytrain_het.sweeps.Results.is_finished`).

    Raises:
        ConfigError, ResourceError: The sweep cannot run here; nothing was started.
        Interrupted: Ctrl-C or SIGTERM. The workers are gone, and the results so far are written.
    """
    if sweep.config.simulate is not None and at_start is None:
        raise ConfigError("simulate: it is the command line's. Write run_sweep(..., at_start=...) for what slows down.")
    folder = check_before_ray(sweep, name=name, resume=resume, address=address)
    say = _teller(to_stderr)
    notes = list(dict.fromkeys(note for job in sweep.jobs_by_data() for note in check_data(job)))
    budget = TimeBudget(sweep.config.time_budget_s)
    try:
        with interruptible(), _quiet(), ray_session(address, num_cpus=_cpus(sweep)):
            at_once = max_concurrent(sweep)
            for note in notes:
                say(note)
            tuner = _restored(sweep, folder, at_once, at_start, retry_failed) if resume else None
            if tuner is None:
                _write_files(sweep, folder)
                tuner = make_tuner(sweep, folder, at_once, at_start=at_start)
            say(
                f"sweep folder: {folder}\n{plural(sweep.num_trials, 'trial')}, {at_once} at once; watch them with:\n"
                f"  tensorboard --logdir {folder}"
            )
            open_ledger(Book(folder, sweep.objective, sweep.num_trials, to_stderr))
            with budget:
                tuner.fit()
        results = read_results(folder)
        if not results.is_finished:
            raise Interrupted(130)
    except Interrupted as end:
        results = _as_far_as_it_came(end, folder, budget, say)
    results.write()
    return results


def _as_far_as_it_came(end: Interrupted, folder: Path, budget: TimeBudget, say: Callable[[str], None]) -> Results:
    """The results of a sweep whose time budget is used up; any other interruption is raised again."""
    go_on = f"the same command with --name {folder.name} --resume goes on"
    if not (folder / SWEEP).exists():
        raise end
    results = read_results(folder)
    if not budget.is_used_up:
        results.write()
        end.hint = f"; {go_on}"
        raise end
    if not results.is_finished:
        say(f"the time budget of {budget.seconds:g} s is used up; {go_on}")
    return results


def max_concurrent(sweep: Sweep) -> int:
    """How many trials run at once: as many as the cluster holds, counted with the most workers that a trial has.

    Raises:
        ResourceError: The cluster cannot hold one.
    """
    from raytrain_het.ray_train.cluster_view import num_at_once

    fitting = 1 if sweep.config.simulate else min(num_at_once(scaling_of(job)) for job in sweep.jobs_by_workers())
    return min(fitting, sweep.config.max_concurrent or fitting, sweep.num_trials)


def make_tuner(sweep: Sweep, folder: Path, at_once: int, *, at_start: AtStart | None = None) -> Any:
    """The ``ray.tune.Tuner`` of a sweep. Ray is running.

    Args:
        sweep: The sweep.
        folder: The sweep's folder.
        at_once: Most trials at once.
        at_start: Called in each worker before its training function.
    """
    from ray import tune

    open_ledger(Book(folder, sweep.objective, sweep.num_trials))
    searcher = sweep.search.searcher(sweep.objective, seed=sweep.config.seed, max_concurrent=at_once)
    grid = not sweep.search.takes_ranges
    return tune.Tuner(
        _trainable(sweep, folder, at_once, at_start),
        param_space=sweep.param_space(),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=sweep.scheduler.scheduler(sweep.objective, epochs=sweep.max_epochs),
            num_samples=1 if grid else sweep.num_trials // sweep.num_grid,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(folder),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # A run has its own.
            callbacks=[Ledger()],
        ),
    )


def _trial_name(trial: Any) -> str:
    return f"trial_{trial.trial_id}"


def _trainable(sweep: Sweep, folder: Path, at_once: int, at_start: AtStart | None) -> Any:
    """Tune's trainable. A trial reserves almost nothing, which keeps it on this node; its workers reserve for
    themselves."""
    import ray
    from ray import tune

    from raytrain_het.sweeps.trial import Trial

    here = ray.get_runtime_context().get_node_id()
    (node,) = (n for n in ray.nodes() if n["NodeID"] == here)
    own = next(name for name in node["Resources"] if name.startswith("node:") and name != "node:__internal_head__")
    trial = tune.with_parameters(Trial, sweep=sweep, folder=str(folder), at_once=at_once, at_start=at_start)
    return tune.with_resources(trial, tune.PlacementGroupFactory([{own: 0.0001}]))


def _restored(sweep: Sweep, folder: Path, at_once: int, at_start: AtStart | None, retry_failed: bool) -> Any:
    """The Tuner of an interrupted sweep; None if the files that Tune has saved are not whole.

    The search then begins anew. The same seed gives the same settings, and a run that is complete is not run again.
    """
    from ray import tune

    if retry_failed:
        for entry in read_ledger(folder).values():
            if entry.status == "failed":
                (folder / "runs" / entry.run / OUTCOME).unlink(missing_ok=True)
    if not _is_whole(folder / TUNE):
        for name in (LEDGER, TUNE):
            if (folder / name).exists():
                (folder / name).rename(folder / f"{name}.{time.strftime('%Y%m%d-%H%M%S')}")
        return None
    return tune.Tuner.restore(
        str(folder / TUNE),
        _trainable(sweep, folder, at_once, at_start),
        param_space=sweep.param_space(),
        resume_errored=retry_failed,  # Not restart_errored: searchers would not know the new trials.
    )


def _is_whole(folder: Path) -> bool:
    """Whether all files of Tune can be read. Tune overwrites them in place, and a kill may leave half a file."""
    state = max(folder.glob("experiment_state-*.json"), default=folder / "none")
    session = state.name.removeprefix("experiment_state-")
    searchers = [folder / f"{name}-{session}" for name in ("basic-variant-state", "search_gen_state")]  # Pickles too.
    pickles = [*folder.glob("*.pkl"), *filter(Path.exists, searchers)]
    try:
        json.loads(state.read_text("utf-8"))
        for path in pickles:
            cloudpickle.loads(path.read_bytes())
        return (folder / "tuner.pkl").exists() and any(map(Path.exists, searchers))
    except Exception:
        return False


def _write_files(sweep: Sweep, folder: Path) -> None:
    for file, text in sweep.files().items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / file, text)


def _cpus(sweep: Sweep) -> float:
    return max(map(num_cpus, sweep.jobs_by_workers())) * (sweep.config.max_concurrent or 1)


def _teller(to_stderr: bool) -> Callable[[str], None]:
    import sys

    return lambda text: print_text(text, sys.stderr if to_stderr else sys.stdout)


@contextmanager
def _quiet() -> Iterator[None]:
    """Set Tune's environment variables and silence its log for the length of the block. The ledger reports a sweep."""
    before = {key: os.environ.get(key) for key in _ENVIRONMENT}
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
