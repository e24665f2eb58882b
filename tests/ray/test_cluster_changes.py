"""Nodes that go and come, controllers that die, and Ctrl-C: nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group_table
from ray_waiting import eventually, free

from raytrain_het.ray_train.scaling import WorkerSpec


def placed() -> list[dict[str, Any]]:
    return [t for t in placement_group_table().values() if t["state"] != "REMOVED"]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_killed_nodes_slot_is_refilled_on_a_node_that_comes(cluster: Any, start: Any) -> None:
    extra = cluster.add_node(num_cpus=1, resources={"spare": 1})
    run = start(workers=[WorkerSpec(), WorkerSpec(resources={"CPU": 1, "spare": 1})])
    before = run.members(2)
    cluster.remove_node(extra, allow_graceful=False)
    eventually(lambda: run.call("peek", "lost"), "the loss is told")
    eventually(lambda: run.call("peek", "vacant"), "the hub is told that nobody comes", 30)
    new = cluster.add_node(num_cpus=1, resources={"spare": 1})
    after = run.members(2, joins=3)
    assert after[1]["node_id"] == new.node_id != before[1]["node_id"]
    assert after[0]["pid"] == before[0]["pid"]
    run.call("tell", "finish")
    run.join()
    cluster.remove_node(new)
    eventually(lambda: free()["CPU"] <= 4, "the node is gone")


def test_a_run_starts_with_the_slots_that_have_room(start: Any) -> None:
    holder = ray.remote(num_cpus=2)(Holder).remote()
    ray.get(holder.ready.remote())
    run = start(workers=[WorkerSpec(count=2, resources={"CPU": 2})])
    (first,) = run.members(1)
    vacant = eventually(lambda: run.call("peek", "vacant"), "the hub is told that nobody comes for now")
    assert set(vacant) == {0, 1} - {first}
    ray.kill(holder)
    assert set(run.members(2)) == {0, 1}
    run.call("tell", "finish")
    run.join()


class Holder:
    """Holds resources."""

    def ready(self) -> None:
        """Answers once the resources are held."""


def test_all_placement_groups_go_when_the_controller_is_killed(cluster: Any, start: Any) -> None:
    run = start()
    pids = [m["pid"] for m in run.members(3).values()]
    assert len(placed()) == 3
    run.call("set", state="running")
    # With the address: Ray would ask the newest cluster of this machine, whoever's it is.
    actors = ray.util.state.list_actors(address=cluster.address)
    controllers = [a for a in actors if "HetController" in a.class_name and a.state == "ALIVE"]
    os.kill(controllers[0].pid, signal.SIGKILL)
    eventually(lambda: not placed(), "placement groups removed", 30)
    eventually(lambda: not any(alive(p) for p in pids), "worker processes gone", 30)
    run._thread.join(30)
    assert isinstance(run.error, ray.exceptions.RayActorError)


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
