"""The mixed group of slots, with a fake membership actor."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
import ray_fakes
from ray.util.placement_group import placement_group_table
from ray_waiting import eventually

from raytrain_het.ray_train.failures import TrainFunctionError
from raytrain_het.ray_train.scaling import WorkerSpec


def placed() -> list[dict[str, Any]]:
    return [t for t in placement_group_table().values() if t["state"] != "REMOVED"]


def test_gpu_and_cpu_workers_live_in_one_run_with_bundles_of_their_own(start: Any) -> None:
    run = start(
        workers=[WorkerSpec(resources={"GPU": 1, "CPU": 1}), WorkerSpec(count=1, resources={"CPU": 2}), WorkerSpec()]
    )
    members = run.members(3)
    assert [len(members[i]["gpu_ids"]) for i in range(3)] == [1, 0, 0]
    assert members[0]["gpus"] == "0"
    assert not members[1]["gpus"]
    assert not members[2]["gpus"]
    assert [members[i]["threads"] for i in range(3)] == ["1", "2", "1"]
    assert {m["world_size"] for m in members.values()} == {3}
    assert {m["group_size"] for m in members.values()} == {1}
    same = [m for m in members.values() if m["node_id"] == members[0]["node_id"]]
    assert sorted(m["local_rank"] for m in same) == list(range(len(same)))
    assert len(placed()) == 3
    run.call("tell", "finish")
    result = run.join()
    assert result.return_value == "value of 0"
    assert result.error is None
    assert not placed()


def test_a_killed_worker_is_refilled_on_its_node_with_its_rank_and_the_others_stay(start: Any) -> None:
    run = start()
    before = run.members(3)
    os.kill(before[1]["pid"], signal.SIGKILL)
    after = run.members(3, joins=4)
    assert after[1]["pid"] != before[1]["pid"]
    assert after[1]["node_id"] == before[1]["node_id"]
    assert after[1]["local_rank"] == before[1]["local_rank"]
    assert [after[i]["pid"] for i in (0, 2)] == [before[i]["pid"] for i in (0, 2)]
    assert [slot for slot, _ in run.call("peek", "lost")] == [1]
    run.call("tell", "finish")
    run.join()


def test_a_stopped_worker_that_its_peers_dropped_is_replaced(start: Any) -> None:
    run = start(workers=[WorkerSpec(count=2)])
    before = run.members(2)
    os.kill(before[1]["pid"], signal.SIGSTOP)
    run.call("leave", 1)
    after = run.members(2, joins=3)
    assert after[1]["pid"] != before[1]["pid"]
    assert after[0]["pid"] == before[0]["pid"]
    run.call("tell", "finish")
    run.join()


def test_a_worker_that_left_is_refilled_while_the_run_goes_on(start: Any) -> None:
    run = start(workers=[WorkerSpec(count=2)])
    before = run.members(2)
    run.call("tell", "leave", 1)
    eventually(lambda: len(run.call("peek", "members")) == 1, "the worker left")
    run.call("tell", "", 1)
    after = run.members(2, joins=3)
    assert after[0]["pid"] == before[0]["pid"]
    run.call("tell", "finish")
    run.join()


def test_all_workers_lost_at_once_are_refilled(start: Any) -> None:
    run = start(workers=[WorkerSpec(count=2)])
    for member in run.members(2).values():
        os.kill(member["pid"], signal.SIGKILL)
    run.members(2, joins=4)
    run.call("tell", "finish")
    assert run.join().error is None


def test_a_run_ends_though_a_slot_is_dead_or_still_starting(start: Any) -> None:
    run = start(workers=[WorkerSpec(count=3)])
    members = run.members(3)
    run.call("set", dead=[2])
    os.kill(members[2]["pid"], signal.SIGKILL)
    eventually(lambda: run.call("peek", "lost"), "the loss is told")
    run.call("tell", "finish", 0, 1)
    os.kill(members[1]["pid"], signal.SIGKILL)
    run.join()
    assert run.result.return_value == "value of 0"


def test_the_training_functions_own_traceback_comes_first(start: Any, capfd: pytest.CaptureFixture[str]) -> None:
    run = start(workers=[WorkerSpec(count=2)])
    run.members(2)
    run.call("tell", "raise", 1)
    with pytest.raises(TrainFunctionError) as caught:
        run.join()
    lines = str(caught.value).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "ray_fakes.py" in lines[1]
    assert "in obey" in lines[1]
    assert lines[-2] == "ValueError: the user's own mistake"
    assert "world rank 1" in lines[-1]
    assert isinstance(caught.value, ray.train.TrainingFailedError)
    assert isinstance(caught.value.worker_failures[1], ValueError)


def test_reports_are_registered_acknowledged_and_kept_as_configured(start: Any, tmp_path: Path) -> None:
    run = start(
        train_fn=report_four_times,
        workers=[WorkerSpec(count=2)],
        run_config=ray.train.RunConfig(
            name="run", storage_path=str(tmp_path), checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2)
        ),
    )
    result = run.join()
    assert result.metrics == {"loss": 0.0}
    assert [m["loss"] for _, m in result.best_checkpoints] == [2.0, 1.0]
    folder = tmp_path / "run"
    assert sorted(p.name[-1] for p in folder.glob("checkpoint_step*")) == ["2", "3"]
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert len((folder / "events.jsonl").read_text().splitlines()) == 2
    assert [w["resources"] for w in json.loads((folder / "config.json").read_text())["workers"]] == [{"CPU": 1.0}] * 2
    assert list(folder.glob("events.out.tfevents*"))
    summary = run.trainer.summary
    assert summary["metrics"] == {"loss": 0.0}
    assert summary["steps"] == 4
    assert [w["world_rank"] for w in summary["workers"]] == [0, 1]

    again = start(train_fn=say_where_it_resumed, workers=[WorkerSpec(count=2)])
    assert again.join().return_value == {"checkpoint": str(folder / "checkpoint_step_00000003"), "step": 3}


def report_four_times() -> None:
    import tempfile

    session = ray_fakes.current
    session.wait_for_all()
    if session.slot == 0:
        for step in (1, 2, 3, 4):
            with tempfile.TemporaryDirectory() as directory:
                session.report(step, {"loss": 4.0 - step}, directory if step < 4 else None)


def say_where_it_resumed() -> Any:
    return ray_fakes.current.resumed
