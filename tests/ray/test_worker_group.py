"""The mixed group of slots, with a fake membership actor: workers that go are replaced while the run goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray_waiting import alive, eventually, placed

from raytrain_het.ray_train.scaling import WorkerSpec

MIXED = (WorkerSpec(resources={"GPU": 1, "CPU": 1}), WorkerSpec(resources={"CPU": 2}), WorkerSpec())


class ThreeWorkers:
    """A run of three workers, all of them there when a test begins."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.before = run.members(3)
        self.num_joins, self.num_lost = len(run.call("peek", "joins")), len(run.call("peek", "lost"))

    def refilled(self, *slots: int) -> dict[int, dict[str, Any]]:
        """The members once these slots have new workers; those of the other slots have stayed."""
        after = self.run.members(3, joins=self.num_joins + len(slots))
        assert [slot for slot in range(3) if after[slot]["pid"] != self.before[slot]["pid"]] == list(slots)
        return after

    def lost(self) -> list[int]:
        """The slots whose workers were lost since the test began."""
        return [slot for slot, _ in self.run.call("peek", "lost")[self.num_lost :]]


@pytest.fixture(scope="module")
def mixed_run(start_shared: Callable[..., Any]) -> Callable[[], ThreeWorkers]:
    """The module's run: what a test does to it, the next test finds repaired. One that has ended is started anew."""
    runs: list[Any] = []

    def start_or_go_on() -> ThreeWorkers:
        if not runs or not runs[-1].is_under_way():
            runs.append(start_shared(workers=MIXED, name=f"mixed{len(runs)}"))
        return ThreeWorkers(runs[-1])

    return start_or_go_on


@pytest.fixture
def three(mixed_run: Callable[[], ThreeWorkers]) -> ThreeWorkers:
    return mixed_run()


def test_gpu_and_cpu_workers_live_in_one_run_with_bundles_of_their_own(three: ThreeWorkers) -> None:
    members = three.before
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


def test_a_killed_worker_is_refilled_on_its_node_with_its_rank_and_the_others_stay(three: ThreeWorkers) -> None:
    before = three.before[1]
    os.kill(before["pid"], signal.SIGKILL)
    after = three.refilled(1)[1]
    assert after["node_id"] == before["node_id"]
    assert after["local_rank"] == before["local_rank"]
    assert three.lost() == [1]


def test_a_stopped_worker_that_its_peers_dropped_is_replaced(three: ThreeWorkers) -> None:
    os.kill(three.before[1]["pid"], signal.SIGSTOP)
    three.run.call("leave", 1)
    assert three.refilled(1)[1]["pid"] != three.before[1]["pid"]


def test_a_worker_that_left_is_refilled_while_the_run_goes_on(three: ThreeWorkers) -> None:
    three.run.call("tell", "leave", 1)
    eventually(lambda: len(three.run.call("peek", "members")) == 2, "the worker left")
    three.run.call("tell", "", 1)
    assert three.refilled(1)[1]["pid"] != three.before[1]["pid"]
    assert three.run.is_under_way()


def test_all_workers_lost_at_once_are_refilled(three: ThreeWorkers) -> None:
    for member in three.before.values():
        os.kill(member["pid"], signal.SIGKILL)
    after = three.refilled(0, 1, 2)
    assert not {member["pid"] for member in after.values()} & {member["pid"] for member in three.before.values()}


def test_all_placement_groups_go_when_the_controller_is_killed(cluster: Any, three: ThreeWorkers) -> None:
    pids = [m["pid"] for m in three.before.values()]
    assert len(placed()) == 3
    three.run.call("set", state="running")
    # With the address: Ray would ask the newest cluster of this machine, whoever's it is.
    actors = ray.util.state.list_actors(address=cluster.address)
    controllers = [a for a in actors if "HetController" in a.class_name and a.state == "ALIVE"]
    os.kill(controllers[0].pid, signal.SIGKILL)
    eventually(lambda: not placed(), "placement groups removed", 30)
    eventually(lambda: not any(alive(p) for p in pids), "worker processes gone", 30)
    with pytest.raises(ray.exceptions.RayActorError):
        three.run.join(30)


def test_a_run_ends_though_a_slot_is_dead_or_still_starting(three: ThreeWorkers) -> None:
    members, run = three.before, three.run
    run.call("set", dead=[2])
    os.kill(members[2]["pid"], signal.SIGKILL)
    eventually(three.lost, "the loss is told")
    run.call("tell", "finish", 0, 1)
    os.kill(members[1]["pid"], signal.SIGKILL)
    result = run.join()
    assert result.return_value == "value of 0"
    assert result.error is None
    assert not placed()
