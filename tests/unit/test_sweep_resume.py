"""A sweep that goes on: what its ledger and its runs remember, whatever Ray Tune does."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sweep_folders import Folder, filled

from raytrain_het.errors import ConfigError
from raytrain_het.sweeps import command, driver
from raytrain_het.sweeps.asha import RememberingASHA
from raytrain_het.sweeps.ledger import read_ledger, results_before
from raytrain_het.sweeps.results import read_results
from raytrain_het.sweeps.runs import read_outcome, run_name
from raytrain_het.sweeps.sweep_file import load_sweep


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return filled(tmp_path)


def test_a_driver_that_comes_back_keeps_the_numbers_and_adds_up_the_time(folder: Folder) -> None:
    folder.ledger = folder.new_ledger()
    folder.trial(0.5, 0.3, 0.4, 0.85, end="complete")
    entries = list(read_ledger(folder.path).values())
    assert [(e.number, e.num_starts, e.status) for e in entries[3:]] == [(4, 1, "complete"), (5, 2, "complete")]
    assert read_results(folder.path).trials.iloc[0]["trial"] == 5


def test_a_ledger_goes_where_its_sweep_was_moved_to(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.trial(0.1, 0.5, 0.6, 0.7, end="complete")
    folder.path = folder.path.rename(tmp_path / "moved")
    folder.ledger = folder.new_ledger()
    folder.trial(0.2, 0.5, end="pruned")
    assert [e.status for e in read_ledger(tmp_path / "moved").values()] == ["complete", "pruned"]


def test_a_pruned_trial_stays_so_whatever_tune_remembers(folder: Folder) -> None:
    """Tune saves every five seconds: a driver that is killed in between has forgotten the pruning."""
    assert read_outcome(folder.path / "runs" / run_name({"lr": 0.2, "seed": 1})) == {"status": "pruned"}
    folder.trial(0.2, end="pruned")
    assert read_results(folder.path).num_by_status["pruned"] == 1


def test_asha_judges_by_what_ended_before(folder: Folder) -> None:
    scheduler = RememberingASHA(metric="m", mode="max", time_attr="epoch", grace_period=1, reduction_factor=2, max_t=9)
    for number in (0.1, 0.4, 0.5):
        scheduler.on_trial_add(None, SimpleNamespace(trial_id=run_name({"lr": number, "seed": 1})))
    rungs = scheduler._brackets[0]._rungs
    seen = {milestone: sorted(recorded.values()) for milestone, recorded in rungs if recorded}
    assert seen == {1: [0.5, 0.5], 2: [0.6, 0.7]}, "of the two that are complete, and nothing of the one that is not"


def test_what_ended_before_is_told_to_schedulers_again_and_nothing_else(folder: Folder) -> None:
    by_lr = {entry.settings["lr"]: key for key, entry in read_ledger(folder.path).items()}
    assert results_before(by_lr[0.1]) == [(1, 0.5), (2, 0.6), (3, 0.7)]
    assert results_before(by_lr[0.2]) == [(1, 0.9)]
    assert [results_before(key) for key in (by_lr[0.3], by_lr[0.5], "never seen")] == [[], [], []]


def test_a_trial_that_tune_has_lost_is_left_out(folder: Folder) -> None:
    kept = [SimpleNamespace(trial_id=key) for key in list(read_ledger(folder.path))[:4]]
    folder.ledger.on_experiment_end(kept)
    assert [entry.number for entry in read_ledger(folder.path).values()] == [1, 2, 3, 4]
    folder.trial(0.5, 0.3, 0.4, 0.5, end="complete")
    assert [entry.number for entry in read_ledger(folder.path).values()] == [1, 2, 3, 4, 5]
    assert read_results(folder.path).is_finished


def test_a_trial_whose_process_never_came_up_is_told_and_the_others_go_on(folder: Folder) -> None:
    lost = SimpleNamespace(trial_id="lost", config={"lr": 0.2, "seed": 7})
    folder.ledger.on_trial_error(0, [], lost)
    entry = read_ledger(folder.path)["lost"]
    assert (entry.status, entry.error, entry.number) == ("failed", "its process ended", 6)


@pytest.mark.parametrize("torn", ["experiment_state-2026.json", "basic-variant-state-2026.json", "tuner.pkl"])
def test_what_a_killed_driver_left_torn_is_put_aside_and_no_run_is_lost(folder: Folder, torn: str) -> None:
    tune = folder.path / driver.TUNE
    tune.mkdir()
    (tune / "experiment_state-2026.json").write_text('{"trial_data": []}')
    (tune / "basic-variant-state-2026.json").write_bytes(pickle.dumps([1, 2]))
    (tune / "tuner.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert driver._is_whole(tune)
    (tune / torn).write_bytes((tune / torn).read_bytes()[:-3])
    assert not driver._is_whole(tune)
    assert driver._restored(folder.sweep, folder.path, 1, None, retry_failed=False) is None
    assert not tune.exists() and read_ledger(folder.path) == {}, "trials are begun anew, and listed anew"
    assert len(list(folder.path.glob("tune.*/*"))) == 3 and len(list(folder.path.glob("trials.jsonl.*"))) == 1
    assert len(list((folder.path / "runs").glob("*/outcome.json"))) == 4, "and what has ended is not run again"


def test_a_trial_that_was_interrupted_took_the_time_until_then(folder: Folder) -> None:
    before = read_ledger(folder.path)[run_name({"lr": 0.5, "seed": 1})]
    assert before.status == "unfinished" and before._began is not None
    ids = list(folder.trials)
    with open(folder.path / "trials.jsonl", "a") as file:
        file.write(json.dumps({"time": before._began + 19, "event": "all", "ids": ids}) + "\n")
    after = read_ledger(folder.path)[run_name({"lr": 0.5, "seed": 1})]
    assert after.wall_s == pytest.approx(before.wall_s + 19)


def test_going_on_needs_a_name_and_says_which_there_are(folder: Folder, tmp_path: Path) -> None:
    options: Any = {"file": "s.yaml", "resume": True, "retry_failed": False, "address": None, "as_json": False}
    sweep = load_sweep(tmp_path / "source.yaml", [f"storage={tmp_path}"])
    with pytest.raises(ConfigError, match=r"there are sweep\. Write --name sweep"):
        command.sweep_command(sweep, **options)
    sweep = load_sweep(tmp_path / "source.yaml", [f"storage={tmp_path}/nowhere"])
    with pytest.raises(ConfigError, match=r"nowhere there is none\. Write --name mine, or --storage"):
        command.sweep_command(sweep, **options)
