"""Sweeps on a real cluster: every trial a whole run, whatever becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from ray_waiting import eventually, free

from raytrain_het import cli
from raytrain_het.jobs.config import Workers
from raytrain_het.sweeps import SweepConfig, load_sweep, make_sweep, run_sweep
from raytrain_het.sweeps.folders import folder_of
from raytrain_het.sweeps.ledger import read_ledger
from raytrain_het.sweeps.runs import read_reports

SWEEP = {
    # The second learns nothing and is pruned after an epoch; the third raises.
    "space": {"lr": {"grid": [0.1, 1e-9, 1e30, 0.05]}},
    "metric": "accuracy",
    "search": "grid",
    "scheduler": {"asha": {"grace_epochs": 1, "reduction_factor": 2}},
    "set": {"epochs": 2, "het.shares": "auto", "global_batch_size": 128},
    "max_concurrent": 1,
    "workers": [{"count": 1}],
}


class Command:
    """``raytrain-het sweep`` on the session's cluster."""

    def __init__(self, folder: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._arguments = ["sweep", str(folder / "s.yaml"), "--storage", str(folder), "--name", "x"]
        self._arguments += ["--address", address]
        self._capsys = capsys

    def start(self, *more: str) -> subprocess.Popen[str]:
        """In a process of its own, which a test can end."""
        return subprocess.Popen(
            [sys.executable, "-m", "raytrain_het.cli", *self._arguments, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *more: str) -> tuple[int, str, str]:
        """In this process, to its end: the exit status, stdout and stderr."""
        self._capsys.readouterr()
        status = cli.main([*self._arguments, *more])
        return status, *self._capsys.readouterr()


@pytest.fixture
def command(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, cluster.address, capsys)


def statuses(folder: Path) -> list[str]:
    return [entry.status for entry in read_ledger(folder).values()]


def num_ended(folder: Path) -> int:
    return sum(status != "unfinished" for status in statuses(folder))


@pytest.fixture
def all_free(cluster: Any) -> Any:
    before = eventually(lambda: free() if free()["CPU"] >= 4 else None, "the last test's resources")
    return lambda: eventually(lambda: free() == before, f"free resources as before ({before})", 60)


@pytest.mark.timeout(900)
def test_a_sweep_that_is_killed_and_interrupted_goes_on_and_runs_nothing_twice(
    command: Command, all_free: Any, tmp_path: Path
) -> None:
    """Of four trials one is pruned and one raises; the driver is killed in the second, and Ctrl-C comes later."""
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP))
    folder = tmp_path / "x"
    driver = command.start()
    try:
        eventually(lambda: num_ended(folder) == 1 and len(statuses(folder)) == 2, "one and a half", 280)
        first = [entry.run for entry in read_ledger(folder).values()][0]
        trained = read_reports(folder / "runs" / first)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    all_free()
    assert "is there already. Write --resume to go on with it, or another --name" in command.run()[2]

    driver = command.start("--resume")
    eventually(lambda: num_ended(folder) == 3 and len(statuses(folder)) == 4, "all but the last", 280)
    driver.send_signal(signal.SIGINT)
    out, said = driver.communicate(timeout=120)
    assert driver.returncode == 130, out + said
    assert "interrupted; all workers are gone; the same command with --name x --resume goes on" in said
    all_free()
    assert sorted(pd.read_parquet(folder / "trials.parquet")["status"])[-1] == "unfinished"

    status, out, progress = command.run("--resume", "--json")
    assert status == 0, progress
    result = json.loads(out)
    entries = list(read_ledger(folder).values())
    assert [entry.status for entry in entries][:3] == ["complete", "pruned", "failed"], progress
    assert entries[3].status in ("complete", "pruned"), "as it compares with the first one, which ASHA remembers"
    assert [entry.num_starts for entry in entries][1::2] == [2, 2], "what was under way goes on"
    assert read_reports(folder / "runs" / first) == trained and len(trained) == 2
    assert (result["complete"] + result["pruned"], result["failed"], result["not begun"]) == (3, 1, 0)
    assert "NonFiniteGradientError" in next(row["error"] for row in result["trials"] if row["status"] == "failed")
    all_free()
    table = pd.read_parquet(folder / "trials.parquet")
    assert table["trial"].tolist()[-1] == 3 and set(table["job.lr"]) == {0.1, 1e-9, 1e30, 0.05}
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["lr"] == table["lr"].iloc[0] and best["name"] is None
    assert_tensorboard_shows_settings_and_metrics(folder)

    status, out, said = command.run("--resume", "--retry-failed")
    assert status == 0, out + said
    again = list(read_ledger(folder).values())
    assert [e.num_starts for e in again] == [e.num_starts + (e.status == "failed") for e in entries]
    assert [e.status for e in again] == [e.status for e in entries], "it raises again, by the same number"
    all_free()


def assert_tensorboard_shows_settings_and_metrics(folder: Path) -> None:
    """Its own reader finds the hyperparameters, and the metrics beside them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    found = {}
    for trial in (folder / "tune").glob("trial_*"):
        for file in trial.glob("events.out.tfevents.*"):
            events = EventAccumulator(str(file)).Reload()
            contents = events.summary_metadata
            for tag in contents:
                if tag == metadata.SESSION_START_INFO_TAG:
                    content = contents[tag].plugin_data.content
                    settings = metadata.parse_session_start_info_plugin_data(content).hparams
                    found[settings["lr"].number_value] = events.Tags()["scalars"]
    assert {0.1, 1e-9} <= set(found)
    assert all("ray/tune/accuracy" in scalars for scalars in found.values())


def test_as_many_trials_run_at_once_as_the_cluster_holds(cluster: Any, all_free: Any, tmp_path: Path) -> None:
    """Two nodes of two CPUs hold two trials that ask for two. A trial ends when it is where it was to get."""
    sweep = make_sweep(
        SweepConfig(
            space={"lr": {"uniform": [0.05, 0.1]}},
            metric={"time_to": {"accuracy": 0.05}},
            trials=2,
            search={"optuna": {"startup_trials": 1}},
            scheduler="asha",
            set={"epochs": 4, "het.shares": "auto", "global_batch_size": 128},
            storage=str(tmp_path),
            workers=(Workers(resources={"CPU": 2}),),
        )
    )
    results = run_sweep(sweep, name="x", address=cluster.address)
    assert results.num_by_status["complete"] == 2
    assert results.trials["reached"].all() and (results.trials["epoch"] < 4).all()
    begun = [json.loads(line)["event"] for line in (results.folder / "trials.jsonl").read_text().splitlines()]
    assert begun[:2] == ["start", "start"], "both at once"
    all_free()


def test_a_sweep_ends_when_its_time_is_used_up_and_can_go_on(
    cluster: Any, all_free: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP | {"set": {"epochs": 10000, "het.shares": "auto"}}))
    sweep = load_sweep(tmp_path / "s.yaml", [f"storage={tmp_path}", "time_budget_s=8"])
    results = run_sweep(sweep, name="x", address=cluster.address)
    # Whether its first trial had begun by then is up to the machine.
    assert results.num_by_status["unfinished"] + results.num_by_status["not begun"] == 4
    said = " ".join(capsys.readouterr().out.split())
    assert "the time budget of 8 s is used up; the same command with --name x --resume goes on" in said
    assert (results.folder / "trials.parquet").exists()
    all_free()
    another = load_sweep(tmp_path / "s.yaml", [f"storage={tmp_path}", "time_budget_s=9"])
    assert folder_of(another, "x", resume=True) == results.folder


def test_a_trial_that_no_node_holds_is_refused_before_anything_starts(command: Command, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP | {"workers": [{"count": 9}]}))
    status, _, said = command.run()
    assert "ask for 9 CPU together, the cluster has 4" in said
    assert status == 2 and not (tmp_path / "x").exists()
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP))
    status, _, said = command.run("--resume")
    assert "--resume: there is no sweep in" in said
    assert status == 2 and os.listdir(tmp_path) == ["s.yaml"]
