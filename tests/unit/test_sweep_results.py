"""What is made of a sweep's folder: tables, the best job, the exit status."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from sweep_folders import Folder, filled, report

from raytrain_het.jobs.digits.job import DigitsJob
from raytrain_het.jobs.table import load_job
from raytrain_het.sweeps import command
from raytrain_het.sweeps.objective import Objective
from raytrain_het.sweeps.results import read_results
from raytrain_het.sweeps.runs import run_name, write_outcome
from raytrain_het.sweeps.sweep import Sweep


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return filled(tmp_path)


def test_every_trial_is_accounted_for_the_best_first(folder: Folder) -> None:
    results = read_results(folder.path)
    told = results.trials[["trial", "status"]].to_records(index=False).tolist()
    assert told == [(4, "complete"), (1, "complete"), (2, "pruned"), (3, "failed"), (5, "unfinished")]
    assert results.num_by_status == {"complete": 2, "pruned": 1, "failed": 1, "unfinished": 1, "not begun": 0}
    assert not results.is_finished
    assert results.trials["value"].tolist()[:3] == [0.8, 0.7, 0.9]
    assert results.trials["error"].tolist()[3].endswith("(raised by it)")


def test_the_tables_have_every_setting_and_what_it_took(folder: Folder) -> None:
    results = read_results(folder.path)
    best = results.trials.iloc[0]
    assert (best["lr"], best["job.lr"], best["job.epochs"], best["job.het.alpha"], best["job.het.shares"]) == (
        0.4,
        0.4,
        3,
        0.0,
        "auto",
    )
    assert (best["epoch"], best["samples"], best["bytes_sent"], best["seconds"]) == (3, 150, 300, 6.0)
    assert best["wall_s"] > 0 and best["fraction_of_aggregate"] == 0.8
    assert results.epochs.groupby("trial").size().to_dict() == {1: 3, 2: 1, 4: 3, 5: 1}
    results.write()
    for name, table in (("trials", results.trials), ("epochs", results.epochs)):
        parquet = pd.read_parquet(folder.path / f"{name}.parquet")
        assert list(parquet.columns) == list(table.columns) and len(parquet) == len(table)
        assert len(pd.read_csv(folder.path / f"{name}.csv")) == len(table)
    assert str(parquet.dtypes["bytes_sent"]) == "Int64"


def test_the_best_setting_is_a_job_that_is_ready_to_run(folder: Folder) -> None:
    read_results(folder.path).write()
    job = load_job(folder.path / "best.yaml")
    assert isinstance(job, DigitsJob) and (job.lr, job.epochs, job.name, job.het.seed) == (0.4, 3, None, 1)
    second = load_job(folder.path / "best-2.yaml")
    assert isinstance(second, DigitsJob) and second.lr == 0.1
    assert not (folder.path / "best-3.yaml").exists(), "one that was pruned is no finalist"


def test_the_table_for_people_and_the_one_for_machines_tell_the_same(folder: Folder) -> None:
    results = read_results(folder.path)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results.table())
    text = console.export_text()
    assert "trial 3 failed: ValueError: no luck" in text and "pruned" in text
    assert "2 complete, 1 pruned, 1 failed, 1 unfinished" in text
    told = json.loads(results.to_json())
    assert (told["best"]["trial"], told["best"]["value"], told["failed"]) == (4, 0.8, 1)
    assert told["trials"][3]["error"] == "ValueError: no luck" and told["trials"][3]["value"] is None


def test_choices_of_several_types_are_texts_in_the_tables(tmp_path: Path) -> None:
    space = {"hierarchy": {"choice": ["auto", True, False]}, "micro_batch_size": {"choice": [None, 16]}}
    folder = Folder(tmp_path, space=space, search="random", trials=2)
    for settings in ({"hierarchy": "auto", "micro_batch_size": "null"}, {"hierarchy": True, "micro_batch_size": 16}):
        folder.ledger.on_trial_start(0, [], SimpleNamespace(trial_id=run_name(settings), config=settings))
    results = read_results(folder.path)
    results.write()
    table = pd.read_parquet(folder.path / "trials.parquet")
    assert table["hierarchy"].tolist() == ["'auto'", "true"]
    assert results.trials["job.het.micro_batch_size"].tolist()[1] == 16


def test_an_error_with_brackets_is_shown_as_it_is(folder: Folder) -> None:
    run = folder.path / "runs" / run_name({"lr": 0.5, "seed": 1})
    write_outcome(run, status="failed", error="OSError: [/tmp/x] is full [bold]")
    folder.ledger.on_trial_error(0, [], folder.trials[run.name])
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(read_results(folder.path).table())
    assert "trial 5 failed: OSError: [/tmp/x] is full [bold]" in console.export_text()


def test_a_target_that_was_not_reached_is_told_as_such(tmp_path: Path) -> None:
    folder = Folder(tmp_path, metric={"time_to": {"accuracy": 0.75}})
    folder.trial(0.1, 0.5, 0.6, 0.7, end="complete")
    folder.trial(0.4, 0.5, 0.8, end="complete")
    results = read_results(folder.path)
    assert results.trials["trial"].tolist() == [2, 1]
    assert results.trials["reached"].tolist() == [True, False]
    assert results.trials["value"].tolist()[0] == 4.0 and math.isnan(results.trials["value"].tolist()[1])
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results.table())
    assert "target not reached" in console.export_text()


def test_over_seeds_settings_are_compared_by_their_means(tmp_path: Path) -> None:
    space = {"lr": {"grid": [0.1, 0.2, 0.3]}, "seed": {"grid": [1, 2]}}
    folder = Folder(tmp_path, space=space)
    for lr, seed, accuracy in ((0.1, 1, 0.9), (0.1, 2, 0.5), (0.2, 1, 0.8), (0.2, 2, 0.8), (0.3, 1, 0.95)):
        folder.trial(lr, accuracy, end="complete", seed=seed)
    folder.trial(0.3, 0.1, end="pruned", seed=2)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(read_results(folder.path).table())
    lines = console.export_text().splitlines()
    at = lines.index("means of accuracy over seeds:")
    assert lines[at + 1].startswith("  lr 0.2: 0.8 (deviation 0, 2 seeds)")
    assert lines[at + 2].startswith("  lr 0.1: 0.7 (deviation 0.2828, 2 seeds)")
    assert not any("lr 0.3:" in line for line in lines), "one of its seeds was pruned"


def test_a_setting_that_counts_for_nothing_is_left_out_of_the_table(tmp_path: Path) -> None:
    space = {"schedule": {"choice": ["step", "cosine"]}, "schedule.cosine.floor": {"uniform": [0.0, 0.2]}}
    folder = Folder(tmp_path, space=space, search="random")
    settings = {"schedule": "step", "schedule.cosine.floor": 0.1}
    folder.ledger.on_trial_start(0, [], SimpleNamespace(trial_id="a", config=settings))
    row = read_results(folder.path).trials.iloc[0]
    assert row["schedule"] == "step" and row["schedule.cosine.floor"] is None
    assert row["job.het.schedule"] == "step"


@pytest.mark.parametrize(
    ("accuracies", "end", "status"),
    [((0.6, 0.95), "complete", 0), ((0.6, 0.8), "complete", 1), ((0.6,), "", 0)],
)
def test_a_sweep_has_failed_if_all_has_ended_and_nothing_has_a_value(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    accuracies: Any,
    end: str,
    status: int,
) -> None:
    folder = Folder(tmp_path, space={"lr": {"grid": [0.1]}}, metric={"time_to": {"accuracy": 0.9}})
    folder.trials.clear()
    settings = {"lr": 0.1}
    trial = SimpleNamespace(trial_id="a", config=settings)
    run = folder.path / "runs" / run_name(settings)
    run.mkdir(parents=True)
    folder.ledger.on_trial_start(0, [], trial)
    (run / "metrics.jsonl").write_text("".join(json.dumps(report(k, a)) + "\n" for k, a in enumerate(accuracies)))
    if end:
        write_outcome(run, status=end)
        folder.ledger.on_trial_complete(0, [], trial)
    monkeypatch.setattr(command, "run_sweep", lambda *args, **keywords: read_results(folder.path))
    options: Any = {"file": "s.yaml", "resume": False, "retry_failed": False, "address": None, "as_json": False}
    assert command.sweep_command(folder.sweep, **options) == status
    assert ("no trial has reached the target" in capsys.readouterr().out) == (max(accuracies) < 0.9)


def test_of_those_that_missed_the_target_the_nearest_comes_first(tmp_path: Path) -> None:
    folder = Folder(tmp_path, metric={"time_to": {"accuracy": 0.95}})
    for lr, accuracy in ((0.1, 0.2), (0.2, 0.8), (0.3, 0.5), (0.4, 0.96)):
        folder.trial(lr, accuracy, end="complete")
    folder.trial(0.5)
    assert list(read_results(folder.path).trials["lr"]) == [0.4, 0.2, 0.3, 0.1, 0.5]


def test_a_sweep_is_plain_data(tmp_path: Path) -> None:
    """It travels to the trials' processes."""
    sweep = Folder(tmp_path).sweep
    again: Sweep = pickle.loads(pickle.dumps(sweep))
    assert again == sweep and isinstance(again.objective, Objective)
