"""What becomes of each trial: a line a time in ``trials.jsonl``, and for people."""

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

from raytrain_het.ray_train.narration import number
from raytrain_het.sweeps.objective import Objective
from raytrain_het.sweeps.runs import read_outcome, run_name

FILE = "trials.jsonl"
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b: ")


@dataclass
class Entry:
    """One trial."""

    number: int
    """From 1, in the order in which they began."""
    settings: dict[str, Any]
    status: str = "unfinished"
    """``complete``, ``pruned``, ``failed``, or ``unfinished``."""
    error: str | None = None
    wall_s: float = 0.0
    """From its beginning to its end, start of workers included; of all times if it was interrupted."""
    num_starts: int = 0
    _began: float | None = field(default=None, repr=False)

    @property
    def run(self) -> str:
        """The name of its run."""
        return run_name(self.settings)

    def take(self, line: Mapping[str, Any]) -> None:
        """The next line about it."""
        if line["event"] == "start":
            self._began, self.status, self.num_starts = line["time"], "unfinished", self.num_starts + 1
            return
        if self._began is not None:
            self.wall_s += line["time"] - self._began
            self._began = None
        if line["event"] != "result":
            self.status, self.error = line["event"], line.get("error")
        else:
            self._began = line["time"]


def read_ledger(folder: Path) -> dict[str, Entry]:
    """All trials by Tune's ids, in the order in which they began."""
    entries: dict[str, Entry] = {}
    try:
        lines = (folder / FILE).read_text("utf-8").splitlines()
    except OSError:
        return entries
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # A killed process has not finished it.
        entry = entries.setdefault(line["id"], Entry(len(entries) + 1, line["settings"]))
        entry.take(line)
    return entries


class Ledger(tune.Callback):
    """Tune's callback that keeps it.

    Args:
        folder: Of the sweep.
        objective: What is told of each result.
        num_trials: How many there will be.
        to_stderr: Where lines for people go, instead of stdout.
    """

    def __init__(self, folder: Path, objective: Objective, num_trials: int, *, to_stderr: bool = False) -> None:
        self._folder, self._objective, self._num_trials, self._to_stderr = folder, objective, num_trials, to_stderr
        self._numbers: dict[str, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self._numbers:
            self._numbers = {key: entry.number for key, entry in read_ledger(self._folder).items()}
        self._numbers.setdefault(trial.trial_id, len(self._numbers) + 1)
        self._note(trial, "start")
        self._say(trial, f"of {self._num_trials} begins: {said(trial.config)}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self._note(trial, "result")
        if "epoch" in result:
            metric = self._objective.metric
            self._say(
                trial, f"epoch {result['epoch']}, {metric} {number(result.get(metric))}, "
                f"{number(result.get('seconds'))} s of training",
            )  # fmt: skip

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        complete = self._outcome(trial).get("status") == "complete"
        self._note(trial, "complete" if complete else "pruned")
        self._say(trial, "is complete" if complete else "is pruned")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = self._outcome(trial).get("error") or "its process ended"
        self._note(trial, "failed", error=error)
        self._say(trial, f"has failed: {last_line(error)}")

    def _outcome(self, trial: Any) -> dict[str, Any]:
        return read_outcome(self._folder / "runs" / run_name(trial.config))

    def _note(self, trial: Any, event: str, **more: Any) -> None:
        line = {"time": time.time(), "event": event, "id": trial.trial_id, "settings": trial.config, **more}
        with open(self._folder / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _say(self, trial: Any, text: str) -> None:
        stream = sys.stderr if self._to_stderr else sys.stdout
        print(f"trial {self._numbers[trial.trial_id]} {text}", file=stream, flush=True)


def said(settings: Mapping[str, Any]) -> str:
    """``alpha 0.31, schedule cosine``."""
    return ", ".join(f"{path} {number(value)}" for path, value in settings.items())


def last_line(error: str) -> str:
    """What a traceback ends with, without our own words about it."""
    lines = [line.strip() for line in error.strip().splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [error])[-1]
