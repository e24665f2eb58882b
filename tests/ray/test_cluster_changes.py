"""Nodes that go and come, and Ctrl-C: nothing is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray_waiting import alive, eventually, free, placed

from raytrain_het.ray_train.failures import TrainFunctionError
from raytrain_het.ray_train.scaling import WorkerSpec


def test_ctrl_c_ends_the_run_and_leaves_nothing(cluster: Any, tmp_path: Path) -> None:
    before = free()
    script = tmp_path / "driver.py"
    script.write_text(_DRIVER)
    driver = subprocess.Popen(
        [sys.executable, str(script), cluster.address, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    pids = eventually(lambda: _lines(tmp_path / "pids", 2), "two workers", 60)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=40)
    assert "interrupted, tidy: True" in output, output
    eventually(lambda: not any(alive(int(p)) for p in pids), "worker processes gone", 20)
    eventually(lambda: free() == before and not placed(), "resources free", 20)


def _lines(path: Path, count: int) -> list[str] | None:
    lines = path.read_text().split() if path.exists() else []
    return lines if len(lines) == count else None


_DRIVER = """
import os, sys, time
import ray, ray_fakes
from raytrain_het.ray_train.hub import Parts
from raytrain_het.ray_train.scaling import HetScalingConfig, WorkerSpec
from raytrain_het.ray_train.trainer import HetTrainer

folder = sys.argv[2]

def train_fn():
    with open(os.path.join(folder, "pids"), "a") as file:
        file.write(f"{os.getpid()}\\n")
    ray_fakes.obey()

ray.init(address=sys.argv[1])
trainer = HetTrainer(train_fn, scaling_config=HetScalingConfig([WorkerSpec(count=2)]),
                     run_config=ray.train.RunConfig(name="c", storage_path=folder))
trainer.parts = Parts(actor=ray_fakes.FakeMembership, run_worker=ray_fakes.run_fake_worker)
try:
    trainer.fit()
except KeyboardInterrupt:
    from ray.util.placement_group import placement_group_table
    groups = [t for t in placement_group_table().values() if t["state"] != "REMOVED"]
    print("interrupted, tidy:", not groups)
"""


class Holder:
    """Holds resources."""

    def ready(self) -> None:
        """Answers once the resources are held."""


@dataclass
class TwoSlots:
    """A run whose second slot needs a node of its own, which was taken when the run started."""

    run: Any
    node: Any
    """The second slot's."""
    early: set[int]
    """The slots that had workers while the node was taken."""
    vacant: list[int]
    """The slots that the hub was told of meanwhile."""


@pytest.fixture(scope="module")
def two_slots(cluster: Any, start_shared: Callable[..., Any]) -> Iterator[TwoSlots]:
    node = cluster.add_node(num_cpus=1, resources={"spare": 1})
    holder = ray.remote(num_cpus=1, resources={"spare": 1})(Holder).remote()
    ray.get(holder.ready.remote())
    run = start_shared(workers=[WorkerSpec(), WorkerSpec(resources={"CPU": 1, "spare": 1})])
    early = set(run.members(1))
    vacant = eventually(lambda: run.call("peek", "vacant"), "the hub is told that nobody comes for now")
    ray.kill(holder)
    two = TwoSlots(run, node, early, list(vacant))
    yield two
    run.clear_away()
    cluster.remove_node(two.node)
    eventually(lambda: free()["CPU"] <= 4, "the node is gone")


def test_a_run_starts_with_the_slots_that_have_room(two_slots: TwoSlots) -> None:
    assert two_slots.early == {0}
    assert set(two_slots.vacant) == {1}
    assert set(two_slots.run.members(2)) == {0, 1}


def test_a_killed_nodes_slot_is_refilled_on_a_node_that_comes(cluster: Any, two_slots: TwoSlots) -> None:
    run, before = two_slots.run, two_slots.run.members(2)
    num_joins, num_vacant = len(run.call("peek", "joins")), len(run.call("peek", "vacant"))
    cluster.remove_node(two_slots.node, allow_graceful=False)
    eventually(lambda: run.call("peek", "lost"), "the loss is told")
    eventually(lambda: len(run.call("peek", "vacant")) > num_vacant, "the hub is told that nobody comes", 30)
    two_slots.node = cluster.add_node(num_cpus=1, resources={"spare": 1})
    after = run.members(2, joins=num_joins + 1)
    assert after[1]["node_id"] == two_slots.node.node_id != before[1]["node_id"]
    assert after[0]["pid"] == before[0]["pid"]


def test_a_worker_on_a_node_that_drains_is_asked_to_leave_and_its_slot_is_refilled_elsewhere(
    cluster: Any, two_slots: TwoSlots
) -> None:
    run, before, old = two_slots.run, two_slots.run.members(2), two_slots.node
    num_joins, num_lost = len(run.call("peek", "joins")), len(run.call("peek", "lost"))
    drain(cluster.gcs_address, old.node_id)
    eventually(lambda: 1 in run.call("peek", "drains"), "the hub is told")
    assert set(run.call("peek", "drains")) == {1}
    run.call("tell", "leave", 1)
    eventually(lambda: len(run.call("peek", "lost")) > num_lost, "it has left")
    run.call("set", orders={})
    two_slots.node = cluster.add_node(num_cpus=1, resources={"spare": 1})
    after = run.members(2, joins=num_joins + 1)
    assert after[1]["node_id"] == two_slots.node.node_id != before[1]["node_id"]
    assert after[0]["pid"] == before[0]["pid"]
    cluster.remove_node(old)


def drain(address: str, node_id: str) -> None:
    """As an autoscaler does that takes a node away."""
    preempted, in_an_hour = 2, int((time.time() + 3600) * 1000)
    accepted, why = ray._raylet.GcsClient(address=address).drain_node(node_id, preempted, "notice", in_an_hour)
    assert accepted, why


def test_the_training_functions_own_traceback_comes_first(two_slots: TwoSlots) -> None:
    run = two_slots.run
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
