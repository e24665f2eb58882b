"""A sweep's folder, filled as a sweep would."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from raytrain_het.sweeps.ledger import Book, Ledger, open_ledger
from raytrain_het.sweeps.runs import rows_of, run_name, write_outcome
from raytrain_het.sweeps.sweep_file import load_sweep

MODES: dict[str, Any] = {"accuracy": "max", "loss": "min"}
SWEEP = {
    "space": {"lr": {"grid": [0.1, 0.2, 0.3, 0.4, 0.5]}, "seed": {"grid": [1]}},
    "metric": "accuracy",
    "search": "grid",
    "set": {"epochs": 3, "het.shares": "auto"},
}


def report(epoch: int, accuracy: float, *, seconds: float = 2.0, num_bytes: int = 100) -> dict[str, Any]:
    return {
        "seq": epoch,
        "key": f"1.{epoch}.0",
        "step": 5 * (epoch + 1),
        "epoch": epoch,
        "metrics": {"accuracy": accuracy},
        "lr": 0.1,
        "fraction_of_aggregate": 0.8,
        "since_last": {"seconds": seconds, "steps": 5, "clipped_steps": 1, "samples": 50, "bytes_sent": num_bytes},
    }


class Folder:
    """A sweep's folder, filled as a sweep would."""

    def __init__(self, path: Path, **changes: Any) -> None:
        (path / "source.yaml").write_text(yaml.safe_dump(SWEEP | changes))
        self.path, self.sweep = path / "sweep", load_sweep(path / "source.yaml")
        for name, text in self.sweep.files().items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_text(text)
        self.ledger = self.new_ledger()
        self.trials: dict[str, SimpleNamespace] = {}

    def new_ledger(self) -> Ledger:
        """As after a restart: Tune brings the callback back from a pickle."""
        open_ledger(Book(self.path, self.sweep.objective, self.sweep.num_trials))
        again: Ledger = pickle.loads(pickle.dumps(Ledger()))
        return again

    def trial(self, lr: float, *accuracies: float, end: str = "", seed: int = 1) -> None:
        settings = {"lr": lr, "seed": seed}
        trial = self.trials.setdefault(
            run_name(settings), SimpleNamespace(trial_id=run_name(settings), config=settings)
        )
        self.ledger.on_trial_start(0, [], trial)
        run = self.path / "runs" / run_name(settings)
        run.mkdir(parents=True, exist_ok=True)
        for epoch, accuracy in enumerate(accuracies):
            with open(run / "metrics.jsonl", "a") as file:
                file.write(json.dumps(report(epoch, accuracy)) + "\n")
            self.ledger.on_trial_result(0, [], trial, rows_of([report(epoch, accuracy)])[0])
        if end == "complete":
            write_outcome(run, status="complete")
        if end == "failed":
            write_outcome(run, status="failed", error="Traceback\n  line\nValueError: no luck\n(raised by it)")
            self.ledger.on_trial_error(0, [], trial)
        elif end:
            self.ledger.on_trial_complete(0, [], trial)


def filled(path: Path) -> Folder:
    """Of two trials that are complete, one that was pruned, one that failed and one that is not at its end."""
    found = Folder(path)
    found.trial(0.1, 0.5, 0.6, 0.7, end="complete")
    found.trial(0.2, 0.9, end="pruned")
    found.trial(0.3, end="failed")
    found.trial(0.4, 0.5, 0.7, 0.8, end="complete")
    found.trial(0.5, 0.3)
    return found
