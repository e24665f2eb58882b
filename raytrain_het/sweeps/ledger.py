"""The ledger of a sweep: a line in ``trials.jsonl`` for each thing that happens to a trial, and a line for people."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune

from raytrain_het.jobs.lines import print_text
from raytrain_het.ray_train.narration import number
from raytrain_het.ray_train.run_folder import append_lines
from raytrain_het.sweeps.objective import Objective
from raytrain_het.sweeps.runs import read_outcome, read_reports, rows_of, run_name, write_outcome

FILE = "trials.jsonl"
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b: ")


@dataclass
class TrialEntry:
    """One trial, as the ledger has it."""

    number: int
    """From 1, in the order in which trials began."""
    settings: dict[str, Any]
    status: str = "unfinished"
    """``complete``, ``pruned``, ``failed``, or ``unfinished``."""
    error: str | None = None
    wall_s: float = 0.0
    """Seconds from its beginning to its end, with the start of its workers; the sum, if it was begun several times."""
    num_starts: int = 0
    _began: float | None = field(default=None, repr=False)

    @property
    def run(self) -> str:
        """The name of its run."""
        return run_name(self.settings)

    def stop(self, time: float) -> None:
        """Count the time of a trial that is under way up to ``time``."""
        if self._began is not None:
            self.wall_s += time - self._began
            self._began = None

    def add_line(self, line: Mapping[str, Any]) -> None:
        """Take in the next line about this trial."""
        if line["event"] == "start":
            self._began, self.status, self.num_starts = line["time"], "unfinished", self.num_starts + 1
            return
        self.stop(line["time"])
        if line["event"] != "result":
            self.status, self.error = line["event"], line.get("error")
        else:
            self._began = line["time"]


def read_ledger(folder: Path) -> dict[str, TrialEntry]:
    """All trials by Tune's ids, in the order in which they began."""
    entries: dict[str, TrialEntry] = {}
    try:
        lines = (folder / FILE).read_text("utf-8").splitlines()
    except OSError:
        return entries
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # A killed process has not finished it.
        if line["event"] == "all":  # Tune does not know the others any more: their search began anew.
            entries = {key: entry for key, entry in entries.items() if key in line["ids"]}
            for entry in entries.values():
                entry.stop(line["time"])
            continue
        number = max((entry.number for entry in entries.values()), default=0) + 1
        entries.setdefault(line["id"], TrialEntry(number, line["settings"])).add_line(line)
    return entries


@dataclass(frozen=True)
class Book:
    """The sweep that this process runs: where its ledger is, and where lines for people go."""

    folder: Path
    objective: Objective
    num_trials: int
    to_stderr: bool = False


_open: list[Book] = []


def open_ledger(book: Book) -> None:
    """Write to this ledger from now on.

    The callback itself cannot hold it: on a resume Tune unpickles the callback as it was, with an old book.
    """
    _open[:] = [book]


def results_before(trial_id: str) -> list[tuple[int, float]]:
    """Pairs (epochs done, the number that schedulers compare) of a trial that has ended; none of another trial."""
    if not _open:
        return []
    book = _open[0]
    entry = read_ledger(book.folder).get(trial_id)
    if entry is None or entry.status not in ("complete", "pruned"):
        return []
    rows = rows_of(read_reports(book.folder / "runs" / entry.run))
    return [(row["epoch"], book.objective.for_scheduler(row)) for row in rows]


class Ledger(tune.Callback):
    """Tune's callback: it writes to the open ledger."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note(trial, "start")
        self._say(trial, f"of {_open[0].num_trials} begins: {settings_text(trial.config)}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self._note(trial, "result")
        if "epoch" in result:
            metric = _open[0].objective.metric
            self._say(
                trial,
                f"epoch {result['epoch']}, {metric} {number(result.get(metric))}, "
                f"{number(result.get('seconds'))} s of training",
            )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        complete = self._outcome(trial).get("status") == "complete"
        if not complete:  # If the driver is killed before Tune has saved this, Tune would resume the trial.
            write_outcome(self._run_folder(trial), status="pruned")
        self._note(trial, "complete" if complete else "pruned")
        self._say(trial, "is complete" if complete else "is pruned")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = self._outcome(trial).get("error") or "its process ended"
        self._note(trial, "failed", error=error)
        self._say(trial, f"has failed: {last_line(error)}")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self._write({"event": "all", "ids": [trial.trial_id for trial in trials]})

    def _outcome(self, trial: Any) -> dict[str, Any]:
        return read_outcome(self._run_folder(trial))

    @staticmethod
    def _run_folder(trial: Any) -> Path:
        return _open[0].folder / "runs" / run_name(trial.config)

    def _note(self, trial: Any, event: str, **more: Any) -> None:
        self._write({"event": event, "id": trial.trial_id, "settings": trial.config, **more})

    def _write(self, line: Mapping[str, Any]) -> None:
        append_lines(_open[0].folder / FILE, json.dumps({"time": time.time(), **line}) + "\n")

    def _say(self, trial: Any, text: str) -> None:
        if trial.trial_id not in self._numbers:
            entries = read_ledger(_open[0].folder)
            self._numbers = {key: entry.number for key, entry in entries.items()}
        stream = sys.stderr if _open[0].to_stderr else sys.stdout
        print_text(f"trial {self._numbers[trial.trial_id]} {text}", stream)


def settings_text(settings: Mapping[str, Any]) -> str:
    """``alpha 0.31, schedule cosine``."""
    return ", ".join(f"{path} {number(value)}" for path, value in settings.items())


def last_line(error: str) -> str:
    """The error at the end of a traceback, without the words that this package adds."""
    lines = [line.strip() for line in error.strip().splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [error])[-1]
