"""What a sweep's folder holds, and what is made of it: rows, outcomes, tables, the best job."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from rich.console import Console

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.digits_config import DigitsJob
from raytrain_het.jobs.table import load_job
from raytrain_het.sweeps import command, driver
from raytrain_het.sweeps.asha import RememberingASHA
from raytrain_het.sweeps.ledger import Book, Ledger, last_line, open_ledger, read_ledger, results_before
from raytrain_het.sweeps.objective import Objective, objective_of
from raytrain_het.sweeps.results import read_results
from raytrain_het.sweeps.runs import read_outcome, read_reports, rows_of, run_name, write_outcome
from raytrain_het.sweeps.sweep import Sweep
from raytrain_het.sweeps.sweep_file import load_sweep

MODES: dict[str, Any] = {"accuracy": "max", "loss": "min"}


def report(epoch: int, accuracy: float, *, seconds: float = 2.0, num_bytes: int = 100) -> dict[str, Any]:
    return {
        "seq": epoch, "key": f"1.{epoch}.0", "step": 5 * (epoch + 1), "epoch": epoch, "metrics": {"accuracy": accuracy},
        "lr": 0.1, "fraction_of_aggregate": 0.8,
        "since_last": {"seconds": seconds, "steps": 5, "clipped_steps": 1, "samples": 50, "bytes_sent": num_bytes},
    }  # fmt: skip


# ---------------------------------------------------------------- rows


def test_what_it_took_is_added_up_from_report_to_report() -> None:
    first, second = rows_of([report(0, 0.5), report(1, 0.7)])
    assert (first["epoch"], first["seconds"], first["samples"], first["bytes_sent"]) == (1, 2.0, 50, 100)
    assert (second["epoch"], second["step"], second["seconds"], second["samples"]) == (2, 10, 4.0, 100)
    assert (second["samples_per_s"], second["clipped_share"], second["lr_now"]) == (25.0, 0.2, 0.1)
    assert second["fraction_of_aggregate"] == 0.8


def test_an_epoch_that_was_trained_again_counts_once_and_its_cost_twice() -> None:
    rows = rows_of([report(0, 0.5), report(1, 0.6), report(2, 0.65), report(1, 0.7)])
    assert [(row["epoch"], row["accuracy"]) for row in rows] == [(1, 0.5), (2, 0.7)]
    assert rows[-1]["seconds"] == 8.0


def test_a_line_that_a_killed_process_left_unfinished_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(report(0, 0.5)) + "\n" + json.dumps(report(1, 0.6))[:40])
    assert [r["epoch"] for r in read_reports(tmp_path)] == [0]
    assert read_reports(tmp_path / "nowhere") == []


# ---------------------------------------------------------------- objectives


def test_the_last_value_of_a_metric_or_nothing() -> None:
    objective = objective_of("accuracy", None, MODES)
    rows = rows_of([report(0, 0.9), report(1, 0.7)])
    assert (objective.value(rows), objective.best, objective.value([])) == (0.7, "max", None)
    assert objective.value(rows_of([report(0, math.nan)])) is None
    assert objective.for_search(rows_of([report(0, math.nan)])) < -1e20
    assert objective.for_scheduler({"accuracy": None}) < -1e20 and objective.for_scheduler({"accuracy": 0.5}) == 0.5
    speed = objective_of("fraction_of_aggregate", None, MODES)
    assert speed.for_scheduler({"fraction_of_aggregate": None}) < 0, "not known in the first epoch"


@pytest.mark.parametrize(("measure", "cost", "value"), [("time_to", "seconds", 4.0), ("bytes_to", "bytes_sent", 200)])
def test_what_a_target_costs_is_read_at_the_first_report_that_has_it(measure: str, cost: str, value: float) -> None:
    objective = objective_of({measure: {"accuracy": 0.7}}, None, MODES)
    assert (objective.cost, objective.best, objective.name) == (cost, "min", f"{cost} to accuracy 0.7")
    assert objective.value(rows_of([report(0, 0.5), report(1, 0.7), report(2, 0.9)])) == value


def test_a_target_that_was_never_reached_is_nothing_and_for_searchers_worse_the_farther_it_is() -> None:
    objective = objective_of({"time_to": {"accuracy": 0.9}}, None, MODES)
    near, far = rows_of([report(0, 0.8)]), rows_of([report(0, 0.1)])
    assert objective.value(near) is None and not any(map(objective.reached, near))
    late = rows_of([report(0, 0.5, seconds=1e6), report(1, 0.95)])
    assert objective.for_search(late) < objective.for_search(near) < objective.for_search(far) < math.inf
    assert objective.for_search(rows_of([report(0, 0.95)])) == 2.0
    falling = objective_of({"time_to": {"loss": 0.3}}, None, MODES)
    assert (
        falling.reached({"loss": 0.3})
        and not falling.reached({"loss": 0.31})
        and not falling.reached({"loss": math.nan})
    )


# ---------------------------------------------------------------- the folder


SWEEP = {
    "space": {"lr": {"grid": [0.1, 0.2, 0.3, 0.4, 0.5]}, "seed": {"grid": [1]}}, "metric": "accuracy", "search": "grid",
    "set": {"epochs": 3, "het.shares": "auto"},
}  # fmt: skip


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


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    found = Folder(tmp_path)
    found.trial(0.1, 0.5, 0.6, 0.7, end="complete")
    found.trial(0.2, 0.9, end="pruned")
    found.trial(0.3, end="failed")
    found.trial(0.4, 0.5, 0.7, 0.8, end="complete")
    found.trial(0.5, 0.3)
    return found


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
        0.4, 0.4, 3, 0.0, "auto",
    )  # fmt: skip
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


def test_of_an_error_its_last_word_is_told() -> None:
    assert (
        last_line("Traceback\n  File x\nmod.MyError: bad\n(raised by the training function)\n\nraytrain-het: x")
        == "mod.MyError: bad"
    )
    assert last_line("its process ended") == "its process ended"


def test_the_same_settings_are_the_same_run_in_whatever_order() -> None:
    assert run_name({"a": 1, "b": 0.5}) == run_name({"b": 0.5, "a": 1}) != run_name({"a": 1, "b": 0.25})


def test_a_sweep_is_plain_data(tmp_path: Path) -> None:
    """It travels to the trials' processes."""
    sweep = Folder(tmp_path).sweep
    again: Sweep = pickle.loads(pickle.dumps(sweep))
    assert again == sweep and isinstance(again.objective, Objective)


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


@pytest.mark.parametrize(
    ("accuracies", "end", "status"),
    [((0.6, 0.95), "complete", 0), ((0.6, 0.8), "complete", 1), ((0.6,), "", 0)],
)
def test_a_sweep_has_failed_if_all_has_ended_and_nothing_has_a_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], accuracies: Any, end: str,
    status: int,
) -> None:  # fmt: skip
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


def test_going_on_needs_a_name_and_says_which_there_are(folder: Folder, tmp_path: Path) -> None:
    options: Any = {"file": "s.yaml", "resume": True, "retry_failed": False, "address": None, "as_json": False}
    sweep = load_sweep(tmp_path / "source.yaml", [f"storage={tmp_path}"])
    with pytest.raises(ConfigError, match=r"there are sweep\. Write --name sweep"):
        command.sweep_command(sweep, **options)
    sweep = load_sweep(tmp_path / "source.yaml", [f"storage={tmp_path}/nowhere"])
    with pytest.raises(ConfigError, match=r"nowhere there is none\. Write --name mine, or --storage"):
        command.sweep_command(sweep, **options)


def test_of_those_that_missed_the_target_the_nearest_comes_first(tmp_path: Path) -> None:
    folder = Folder(tmp_path, metric={"time_to": {"accuracy": 0.95}})
    for lr, accuracy in ((0.1, 0.2), (0.2, 0.8), (0.3, 0.5), (0.4, 0.96)):
        folder.trial(lr, accuracy, end="complete")
    folder.trial(0.5)
    assert list(read_results(folder.path).trials["lr"]) == [0.4, 0.2, 0.3, 0.1, 0.5]
