"""What a trial's reports come to: rows, and what a sweep looks for in them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from sweep_folders import MODES, report

from raytrain_het.sweeps.ledger import last_line
from raytrain_het.sweeps.objective import objective_of
from raytrain_het.sweeps.runs import read_reports, rows_of, run_name


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


def test_of_an_error_its_last_word_is_told() -> None:
    assert (
        last_line("Traceback\n  File x\nmod.MyError: bad\n(raised by the training function)\n\nraytrain-het: x")
        == "mod.MyError: bad"
    )
    assert last_line("its process ended") == "its process ended"


def test_the_same_settings_are_the_same_run_in_whatever_order() -> None:
    assert run_name({"a": 1, "b": 0.5}) == run_name({"b": 0.5, "a": 1}) != run_name({"a": 1, "b": 0.25})
