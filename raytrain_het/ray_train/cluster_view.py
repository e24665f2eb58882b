"""What the cluster has now, and what its autoscaler may add. ``resources`` has the rules, this module asks Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import ray
import yaml
from ray._private.state import state as ray_state

from raytrain_het.ray_train.resources import (
    NodeShape,
    SlotSpec,
    check_feasible,
    num_fitting,
    resolve_auto,
    shapes_of,
)
from raytrain_het.ray_train.scaling import HetScalingConfig

_SETTLE_S = 3.0


def settle(scaling: HetScalingConfig) -> HetScalingConfig:
    """Resolve ``"auto"`` and check that the cluster can hold the workers, before any of them starts.

    Raises:
        ResourceError: It cannot.
    """
    leaving = draining_nodes()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
    if scaling.workers == "auto":
        return scaling.resolved(resolve_auto(nodes, _free_resources()))
    slots = scaling.resolved_slots
    types = autoscaler_types()
    shapes = shapes_of(nodes) + (types or [])
    # A node type with unknown resources could hold anything: Ray decides.
    if not any(not s.resources for s in types or []):
        check_feasible(slots, shapes)
    return scaling


def num_at_once(scaling: HetScalingConfig) -> int:
    """How many runs with these workers the cluster holds at the same time, with what its autoscaler may add.

    With ``"auto"`` it is one run, which takes the whole cluster.

    Raises:
        ResourceError: The cluster cannot hold one run.
    """
    if scaling.workers == "auto":
        return 1
    slots = settle(scaling).resolved_slots
    return num_fitting(slots, shapes_of([n for n in ray.nodes() if n["Alive"]]) + (autoscaler_types() or []))


def _free_resources() -> dict[str, dict[str, float]]:
    """Free resources, by node id. A run that has just ended returns its resources within a moment: wait for them."""
    deadline = time.monotonic() + _SETTLE_S
    best = ray_state.available_resources_per_node()
    while time.monotonic() < deadline:
        total = ray_state.total_resources_per_node()
        if all(best.get(n, {}).get(k, 0) >= t.get(k, 0) for n, t in total.items() for k in ("CPU", "GPU")):
            break
        time.sleep(0.2)
        now = ray_state.available_resources_per_node()
        if now == best:
            break
        best = now
    return best


def autoscaler_types() -> list[NodeShape] | None:
    """The node types an autoscaler can start, or ``None`` where there is no autoscaler.

    Clusters made by ``ray up`` keep their configuration in the head node's home; managed ones
    publish it through Ray's state.
    """
    config = ray_state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return [
            NodeShape(
                name=f"type {g.name or i}",
                resources={k: float(v) for k, v in g.resources.items()},
                max_count=None if g.max_count < 0 else int(g.max_count),
            )
            for i, g in enumerate(config.node_group_configs)
            if g.max_count != 0
        ]
    path = Path(os.path.expanduser("~/ray_bootstrap_config.yaml"))
    if not path.exists():
        return None
    try:
        types = (yaml.safe_load(path.read_text()) or {}).get("available_node_types", {})
    except (OSError, yaml.YAMLError):
        return None
    return [
        NodeShape(
            name=f"type {name}",
            resources={k: float(v) for k, v in (t.get("resources") or {}).items()},
            labels=dict(t.get("labels") or {}),
            max_count=int(t.get("max_workers", 1)),
        )
        for name, t in types.items()
        if t.get("max_workers", 1)
    ]


def draining_nodes() -> set[str]:
    """Ids of the nodes that Ray will take away: their machines are idle, or were given notice."""
    return set(ray_state.get_draining_nodes())


def node_stays(node_id: str) -> bool:
    """Whether a worker may be started on this node."""
    return node_alive(node_id) and node_id not in draining_nodes()


def node_alive(node_id: str | None) -> bool:
    """Whether Ray still counts this node as alive."""
    return any(n["NodeID"] == node_id and n["Alive"] for n in ray.nodes())


def describe_free(slots: Sequence[SlotSpec]) -> str:
    """The free amounts of the resources that some slots need, for a message to the user."""
    names = {name for slot in slots for name in slot.resources}
    free: dict[str, float] = dict.fromkeys(sorted(names), 0.0)
    for node in ray_state.available_resources_per_node().values():
        for name in names:
            free[name] += node.get(name, 0)
    return ", ".join(f"{name}: {amount:g}" for name, amount in free.items())
