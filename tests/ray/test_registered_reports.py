"""What a run's reports leave behind, and what the next run of the name makes of it; with a fake membership actor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import ray_fakes

from raytrain_het.errors import CheckpointError
from raytrain_het.ray_train.scaling import WorkerSpec


@dataclass
class Reported:
    """A run of two workers that has ended."""

    run: Any
    result: Any
    storage: Path
    updates: list[tuple]

    @property
    def folder(self) -> Path:
        """The run's own."""
        return self.storage / "run"


@pytest.fixture(scope="module")
def reported(start_shared: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """Four reports, three of them with a checkpoint."""
    storage, updates = tmp_path_factory.mktemp("reported"), []
    run = start_shared(
        train_fn=report_four_times,
        workers=[WorkerSpec(count=2)],
        run_config=ray.train.RunConfig(
            name="run", storage_path=str(storage), checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2)
        ),
        on_update=lambda *update: updates.append(update),
    )
    return Reported(run, run.join(), storage, updates)


def report_four_times() -> None:
    import tempfile

    session = ray_fakes.current
    session.wait_for_all()
    if session.slot == 0:
        for step in (1, 2, 3, 4):
            with tempfile.TemporaryDirectory() as directory:
                session.report(step, {"loss": 4.0 - step}, directory if step < 4 else None)


def test_reports_are_registered_acknowledged_and_kept_as_configured(reported: Reported) -> None:
    assert reported.result.metrics == {"loss": 0.0}
    assert [m["loss"] for _, m in reported.result.best_checkpoints] == [2.0, 1.0]
    folder = reported.folder
    assert sorted(p.name[-1] for p in folder.glob("checkpoint_step*")) == ["2", "3"]
    assert json.loads((folder / "checkpoint_step_00000003" / "het.json").read_text()) == {
        "cursor": {"epoch": 0, "offset": 0, "step": 3}
    }
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert len((folder / "events.jsonl").read_text().splitlines()) == 2
    assert [w["resources"] for w in json.loads((folder / "config.json").read_text())["workers"]] == [{"CPU": 1.0}] * 2
    assert list(folder.glob("events.out.tfevents*"))


def test_the_summary_has_the_last_metrics_the_steps_and_the_workers(reported: Reported) -> None:
    summary = reported.run.trainer.summary
    assert summary["metrics"] == {"loss": 0.0} == reported.result.het_summary["metrics"]
    assert summary["steps"] == 4
    assert [w["world_rank"] for w in summary["workers"]] == [0, 1]


def test_the_driver_is_told_of_updates(reported: Reported) -> None:
    assert [r["step"] for _, _, reports in reported.updates for r in reports] == [1, 2, 3, 4]
    assert sorted(e["slot"] for _, events, _ in reported.updates for e in events) == [0, 1]


def test_the_same_name_resumes_at_the_newest_checkpoint(start: Any, reported: Reported) -> None:
    again = start(train_fn=say_where_it_resumed, workers=[WorkerSpec()], run_config=same_name(reported))
    checkpoint = str(reported.folder / "checkpoint_step_00000003")
    assert again.join().return_value == {"checkpoint": checkpoint, "step": 3}


def test_a_checkpoint_of_another_library_is_refused(start: Any, reported: Reported) -> None:
    ours = reported.folder / "checkpoint_step_00000003" / "het.json"
    text = ours.read_text()
    ours.unlink()
    again = start(train_fn=say_where_it_resumed, workers=[WorkerSpec()], run_config=same_name(reported))
    with pytest.raises(CheckpointError, match="het.json does not exist.*another RunConfig"):
        again.join()
    ours.write_text(text)


def same_name(reported: Reported) -> ray.train.RunConfig:
    return ray.train.RunConfig(name="run", storage_path=str(reported.storage))


def say_where_it_resumed() -> Any:
    return ray_fakes.current.resumed
