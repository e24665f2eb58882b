"""A trial, with a stand-in for the trainer: what it tells of its run, and what it finds when it comes back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.tune import TuneError
from ray.tune.result import DONE

from raytrain_het.errors import ConfigError
from raytrain_het.ray_train.run_folder import LastCheckpoint
from raytrain_het.sweeps import runs
from raytrain_het.sweeps import trial as trials
from raytrain_het.sweeps.runs import read_outcome, run_name, write_outcome
from raytrain_het.sweeps.search import FOR_SCHEDULER, FOR_SEARCH
from raytrain_het.sweeps.sweep_file import load_sweep

SETTINGS = {"lr": 0.1}


def report(epoch: int, accuracy: float) -> dict[str, Any]:
    since = {"seconds": 2.0, "steps": 5, "clipped_steps": 0, "samples": 50, "bytes_sent": 100}
    return {"step": 5 * epoch + 5, "epoch": epoch, "metrics": {"accuracy": accuracy}, "since_last": since}


class Trainer:
    """Reports what it is told to, writes it down as a run does, and then waits to be ended or raises."""

    made: list[Trainer]

    def __init__(self, job: Any, on_update: Callable[..., None], accuracies: list[float], end: Any) -> None:
        self.job, self.on_update, self.accuracies, self.end = job, on_update, accuracies, end
        self.folder = Path(job.storage) / job.name
        self.aborted = threading.Event()
        Trainer.made.append(self)

    def fit(self) -> None:
        first = len(runs.read_reports(self.folder))
        for epoch, accuracy in enumerate(self.accuracies[first:], start=first):
            line = report(epoch, accuracy)
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            self.on_update({}, [], [line])
        if self.end == "waits":
            assert self.aborted.wait(30)
            raise RuntimeError("aborted")
        if self.end is not None:
            raise self.end

    def abort(self) -> None:
        self.aborted.set()


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., trials.Trial]:
    """Makes one, of a job of four epochs."""
    Trainer.made = []

    def make(accuracies: list[float], *, end: Any = None, metric: Any = "accuracy", at_once: int = 1) -> trials.Trial:
        sweep = {"space": {"lr": {"grid": [0.1, 0.2]}}, "metric": metric, "search": "grid", "set": {"epochs": 4}}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep))
        monkeypatch.setattr(
            trials, "make_trainer", lambda job, on_update, at_start: Trainer(job, on_update, accuracies, end)
        )
        made = trials.Trial.__new__(trials.Trial)
        made.setup(dict(SETTINGS), sweep=load_sweep(tmp_path / "s.yaml"), folder=str(tmp_path), at_once=at_once)
        return made

    return make


def all_of(trial: trials.Trial) -> list[float]:
    told = []
    while not (row := trial.step()).get(DONE):
        told.append(row["accuracy"])
    trial.cleanup()
    return told


def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / run_name(SETTINGS)


def test_every_report_is_a_result_and_the_last_one_comes_when_the_run_is_over(
    trial: Callable[..., trials.Trial], tmp_path: Path
) -> None:
    made = trial([0.1, 0.2, 0.3, 0.4])
    rows = [made.step() for _ in range(4)]
    assert read_outcome(folder(tmp_path)) == {"status": "complete"}, "before the last result: it may end the trial"
    assert [(row["epoch"], row["accuracy"], row[FOR_SEARCH], row["seconds"]) for row in rows] == [
        (1, 0.1, 0.1, 2.0),
        (2, 0.2, 0.2, 4.0),
        (3, 0.3, 0.3, 6.0),
        (4, 0.4, 0.4, 8.0),
    ]
    assert made.step()[DONE]
    (trainer,) = Trainer.made
    assert (trainer.job.lr, trainer.job.epochs) == (0.1, 4)
    assert yaml.safe_load((folder(tmp_path) / "job.yaml").read_text())["lr"] == 0.1


def test_a_trial_that_is_pruned_ends_its_run(trial: Callable[..., trials.Trial], tmp_path: Path) -> None:
    made = trial([0.1, 0.2], end="waits")
    assert made.step()["epoch"] == 1
    made.cleanup()
    assert Trainer.made[0].aborted.is_set() and read_outcome(folder(tmp_path)) == {}


def test_the_process_of_a_trial_that_was_pruned_takes_the_next_one(trial: Callable[..., trials.Trial]) -> None:
    made = trial([0.1, 0.2], end="waits")
    made.step()
    assert made.reset_config({"lr": 0.2})
    assert made.step()["epoch"] == 1
    made.cleanup()
    assert [t.job.lr for t in Trainer.made] == [0.1, 0.2] and all(t.aborted.is_set() for t in Trainer.made)


def test_a_trial_that_comes_back_tells_what_it_has_and_goes_on(trial: Callable[..., trials.Trial]) -> None:
    first = trial([0.1, 0.2], end="waits")
    first.step(), first.step()
    first.cleanup()
    second = trial([0.1, 0.2, 0.3, 0.4])
    assert all_of(second) == [0.1, 0.2, 0.3, 0.4]
    assert len(Trainer.made) == 2


def test_a_run_that_has_ended_is_not_run_again(trial: Callable[..., trials.Trial], tmp_path: Path) -> None:
    assert all_of(trial([0.1, 0.2, 0.3, 0.4])) == [0.1, 0.2, 0.3, 0.4]
    assert all_of(trial([0.9] * 4)) == [0.1, 0.2, 0.3, 0.4] and len(Trainer.made) == 1
    (folder(tmp_path) / "outcome.json").unlink()
    assert all_of(trial([0.9] * 4)) == [0.1, 0.2, 0.3, 0.4] and len(Trainer.made) == 1, "killed before it could say so"
    assert read_outcome(folder(tmp_path)) == {"status": "complete"}


def test_a_training_function_that_raises_fails_the_trial_then_and_ever(
    trial: Callable[..., trials.Trial], tmp_path: Path
) -> None:
    made = trial([0.1], end=ValueError("no luck"))
    assert made.step()["epoch"] == 1
    with pytest.raises(ValueError, match="no luck"):
        made.step()
    made.cleanup()
    assert "no luck" in read_outcome(folder(tmp_path))["error"]
    again = trial([0.1, 0.2, 0.3, 0.4])
    assert again.step()["epoch"] == 1
    with pytest.raises(TuneError, match="no luck"):
        again.step()
    again.cleanup()
    assert len(Trainer.made) == 1


def test_a_trial_ends_where_it_was_to_get(trial: Callable[..., trials.Trial], tmp_path: Path) -> None:
    metric = {"time_to": {"accuracy": 0.2}}
    made = trial([0.1, 0.25, 0.3], end="waits", metric=metric)
    first, second = made.step(), made.step()
    assert first[FOR_SEARCH] > 1e17 and (second[FOR_SEARCH], second[FOR_SCHEDULER]) == (4.0, 0.25)
    assert read_outcome(folder(tmp_path)) == {"status": "complete"}, (
        "before its report is known: it may be pruned by it"
    )
    assert made.step()[DONE]
    made.cleanup()
    assert Trainer.made[0].aborted.is_set()
    (folder(tmp_path) / "outcome.json").unlink()
    assert all_of(trial([0.9], metric=metric)) == [0.1, 0.25] and len(Trainer.made) == 1
    assert read_outcome(folder(tmp_path)) == {"status": "complete"}


def test_a_report_that_a_killed_process_did_not_write_down_comes_from_its_checkpoint(
    trial: Callable[..., trials.Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trial([0.1, 0.2], end="waits")
    first.step(), first.step()
    first.cleanup()
    with open(folder(tmp_path) / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "epo')  # On a full disk it may have written half of it.
    stored = LastCheckpoint(path="there", epoch=3, step=15, offset=0, metrics={"accuracy": 0.3})
    monkeypatch.setattr(runs, "last_checkpoint_of", lambda storage, name: stored)
    assert all_of(trial([0.1, 0.2, 0.3, 0.4])) == [0.1, 0.2, 0.3, 0.4]
    rows = runs.rows_of(runs.read_reports(folder(tmp_path)))
    assert [(row["epoch"], row["seconds"]) for row in rows] == [(1, 2.0), (2, 4.0), (3, 4.0), (4, 6.0)]


def test_settings_that_make_no_job_fail_their_trial_with_the_reason(
    trial: Callable[..., trials.Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sweep: Any, settings: Any) -> None:
        raise ConfigError("lr=-1.0 is not valid")

    made = trial([0.1])
    monkeypatch.setattr(type(made._sweep), "job_of", refuse)
    with pytest.raises(ConfigError, match="lr=-1.0"):
        made.step()
    made.cleanup()
    assert "lr=-1.0" in read_outcome(folder(tmp_path))["error"]


def test_a_training_function_of_ones_own_is_swept_report_by_report(tmp_path: Path) -> None:
    class Own:
        on_update: Any = None

        def __init__(self, lr: float) -> None:
            self.lr = lr

        def fit(self) -> None:
            for epoch in range(2):
                self.on_update({}, [], [report(epoch, self.lr)])
            if self.lr > 1:
                raise ValueError("no luck")

        def abort(self) -> None:
            pass

    kind = trials.trainable(lambda settings: Own(settings["lr"]))
    made = kind.__new__(kind)
    made.setup({"lr": 0.5})
    assert [(row["epoch"], row["accuracy"], row["seconds"]) for row in (made.step(), made.step())] == [
        (1, 0.5, 2.0),
        (2, 0.5, 4.0),
    ]
    assert made.step()[DONE]
    assert made.reset_config({"lr": 2.0})
    made.step(), made.step()
    with pytest.raises(TuneError, match="no luck"):
        made.step()
    made.cleanup()


def test_two_trials_with_the_same_settings_are_one_run(trial: Callable[..., trials.Trial], tmp_path: Path) -> None:
    """The second waits for the first, and takes what it has found."""
    first, second = trial([0.1, 0.2, 0.3, 0.4]), trial([0.9] * 4)
    first._sweep = second._sweep
    assert first.step()["epoch"] == 1
    told: list[float] = []
    waiting = threading.Thread(target=lambda: told.extend(all_of(second)))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive() and not told
    all_of(first)
    waiting.join(10)
    assert told == Trainer.made[0].accuracies and len(Trainer.made) == 1


def test_no_more_trials_run_at_once_than_fit_now(trial: Callable[..., trials.Trial]) -> None:
    """Whatever Tune has in mind, which may have begun where more did."""
    first, second = trial([0.1, 0.2]), trial([0.3, 0.4])
    second.reset_config({"lr": 0.2})
    first.step()
    begun = threading.Event()
    waiting = threading.Thread(target=lambda: (second.step(), begun.set()))
    waiting.start()
    assert not begun.wait(0.3)
    first.cleanup()
    assert begun.wait(10)
    second.cleanup()
    third, fourth = trial([0.1, 0.2, 0.3], at_once=2), trial([0.1, 0.2, 0.3], at_once=2)
    fourth.reset_config({"lr": 0.2})
    third.step(), fourth.step()
    third.cleanup(), fourth.cleanup()


def test_an_outcome_that_was_written_is_read_and_a_torn_one_is_none(tmp_path: Path) -> None:
    write_outcome(tmp_path / "a", status="failed", error="x")
    assert read_outcome(tmp_path / "a") == {"status": "failed", "error": "x"}
    (tmp_path / "a" / "outcome.json").write_text('{"status": "fai')
    assert read_outcome(tmp_path / "a") == {}
