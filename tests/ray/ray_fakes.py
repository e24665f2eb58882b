"""A membership actor and a session with nothing behind them: Ray's side is tested alone.

Workers import this module by name, so it keeps its state in module globals of theirs.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from typing import Any

import ray

from raytrain_het.config import HetConfig
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.run_context import RunContext

current: FakeSession | None = None


class FakeMembership:
    """Does what it is told by the workers and by the test."""

    def __init__(self, config: HetConfig, context: RunContext) -> None:
        self.context = context
        self.members: dict[int, dict[str, Any]] = {}
        self.joins: list[dict[str, Any]] = []
        self.lost: list[tuple[int, str]] = []
        self.vacant: list[int] = []
        self.drains: list[int] = []
        self.dead: list[int] = []
        self.state = "running"
        self.failure: str | None = None
        self.orders: dict[int, str] = {}
        self.pending: list[dict[str, Any]] = []
        self.all_reports: list[dict[str, Any]] = []
        self.acknowledged: list[str] = []

    # The real one's surface

    def address(self) -> dict[str, Any]:
        return {"name": ray.get_runtime_context().get_actor_name()}

    def slot_lost(self, slot: int, reason: str) -> None:
        self.lost.append((slot, reason))
        self.members.pop(slot, None)

    def slot_vacant(self, slot: int, reason: str) -> None:
        self.vacant.append(slot)

    def slot_drains(self, slot: int, reason: str) -> None:
        self.drains.append(slot)

    def take_reports(self) -> list[dict[str, Any]]:
        return list(self.pending)

    def acknowledge(self, keys: list[str]) -> None:
        self.acknowledged += keys
        self.pending = [r for r in self.pending if r["key"] not in keys]

    def status(self) -> dict[str, Any]:
        return {
            "generation": len(self.joins),
            "step": max([r["step"] for r in self.all_reports], default=0),
            "samples": 10 * len(self.all_reports),
            "state": self.state,
            "failure": self.failure,
            "vacant": [s for s in range(self.context.num_slots) if s not in self.members],
            "dead_slots": self.dead,
            "num_joined": dict(Counter(j["slot"] for j in self.joins)),
            "members": list(self.members.values()),
        }

    def events(self, since: int) -> list[dict[str, Any]]:
        return [{"seq": i, "kind": "join", **j} for i, j in enumerate(self.joins)][since:]

    def reports(self, since: int) -> list[dict[str, Any]]:
        return [dict(r, seq=i) for i, r in enumerate(self.all_reports)][since:]

    def shutdown(self) -> None:
        pass

    # For the workers and the test

    def join(self, member: dict[str, Any]) -> dict[str, Any]:
        self.joins.append(member)
        self.members[member["slot"]] = member
        return {"checkpoint": self.context.checkpoint, "step": (self.context.checkpoint_cursor or Cursor()).step}

    def done(self, slot: int) -> None:
        if slot in self.members:
            self.members[slot]["finished"] = True

    def leave(self, slot: int) -> None:
        self.members.pop(slot, None)

    def order(self, slot: int) -> str | None:
        return self.orders.get(slot)

    def tell(self, order: str, *slots: int) -> None:
        for slot in slots or range(self.context.num_slots):
            self.orders[slot] = order

    def set(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def peek(self, name: str) -> Any:
        return getattr(self, name)

    def add_report(self, step: int, metrics: dict[str, float], checkpoint: str | None) -> None:
        report = {"key": f"r{step}", "step": step, "epoch": 0, "metrics": metrics, "checkpoint": checkpoint}
        self.pending.append(report)
        self.all_reports.append(report)


class FakeSession:
    """What a test's training function sees as ``ray_fakes.current``."""

    def __init__(self, hub: Any, slot: int, storage: Any, resumed: dict[str, Any]) -> None:
        self.hub, self.slot, self.storage, self.resumed = hub, slot, storage, resumed

    def order(self) -> str | None:
        return ray.get(self.hub.order.remote(self.slot))

    def wait_for_all(self) -> None:
        """Until every slot's worker has joined."""
        while len(ray.get(self.hub.peek.remote("members"))) < ray.get(self.hub.peek.remote("context")).num_slots:
            time.sleep(0.05)

    def report(self, step: int, metrics: dict[str, float], directory: str | None = None) -> None:
        path = None
        if directory:
            with open(os.path.join(directory, "het.json"), "w") as file:
                json.dump({"cursor": Cursor(step=step).to_dict()}, file)
            path = self.storage.persist(directory, f"checkpoint_step_{step:08d}")
        ray.get(self.hub.add_report.remote(step, metrics, path))


def run_fake_worker(
    train_fn: Any, *, config: Any, slot: int, num_slots: int, locate: Any, storage: Any, device: Any, node_ip: str
) -> Any:
    global current
    import torch.distributed as dist

    hub = ray.get_actor(locate()["name"])
    context = ray.train.get_context()
    member = {
        "slot": slot,
        "uid": f"{slot}-{os.getpid()}",
        "pid": os.getpid(),
        "device": str(device),
        "node_ip": node_ip,
        "node_id": ray.get_runtime_context().get_node_id(),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpu_ids": ray.get_gpu_ids(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "local_rank": context.get_local_rank(),
        "local_world_size": context.get_local_world_size(),
        "world_size": context.get_world_size(),
        "group_size": dist.get_world_size(),
        "batch_share": 8,
        "finished": False,
    }
    resumed = ray.get(hub.join.remote(member))
    current = FakeSession(hub, slot, storage, resumed)
    value = train_fn()
    if ray.get(hub.order.remote(slot)) == "leave":
        ray.get(hub.leave.remote(slot))
    else:
        ray.get(hub.done.remote(slot))
    return value


def obey() -> str:
    """A training function that waits for the test's word."""
    session = current
    assert session is not None
    while (order := session.order()) not in ("finish", "leave"):
        if order == "raise":
            raise_deep()
        time.sleep(0.05)
    return f"value of {session.slot}"


def raise_deep() -> None:
    raise ValueError("the user's own mistake")
