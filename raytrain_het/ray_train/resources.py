"""From nodes to slots: pure functions over the dictionaries that ``ray.nodes()`` gives.

A *slot* is the place of one worker. Nothing here talks to a cluster: every rule is tested with plain dictionaries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytrain_het.errors import ResourceError

Resources = dict[str, float]
NODE_ID_LABEL = "ray.io/node-id"
_SEARCH_LIMIT = 20_000
"""After so many tried placements the packing check leaves the decision to Ray."""


@dataclass(frozen=True, kw_only=True)
class SlotSpec:
    """What the worker in one slot needs."""

    resources: Resources
    labels: dict[str, str] = field(default_factory=dict)
    node_id: str | None = None
    """The node that the slot was made for (``workers="auto"``); None once that node is gone."""

    origin: str = "workers"
    """The setting that the slot comes from, for messages."""

    def selector(self, *, pinned: bool = True) -> dict[str, str]:
        """The label selector of its placement group."""
        pin = {NODE_ID_LABEL: self.node_id} if pinned and self.node_id else {}
        return {**self.labels, **pin}


@dataclass(frozen=True, kw_only=True)
class NodeShape:
    """What one node offers: a live one, or a type that the autoscaler can start."""

    name: str
    resources: Resources
    labels: dict[str, str] = field(default_factory=dict)
    max_count: int | None = 1
    """How many of them there can be; ``None`` is any number."""


def shapes_of(nodes: Sequence[Mapping[str, Any]]) -> list[NodeShape]:
    """The live nodes of ``ray.nodes()`` as shapes."""
    return [
        NodeShape(
            name=str(n.get("NodeManagerAddress") or n["NodeID"][:8]),
            resources=dict(n.get("Resources", {})),
            labels=dict(n.get("Labels", {})),
        )
        for n in nodes
        if n.get("Alive", True)
    ]


def resolve_auto(
    nodes: Sequence[Mapping[str, Any]], available: Mapping[str, Mapping[str, float]] | None = None
) -> list[SlotSpec]:
    """One slot per GPU with a fair part of its node's CPUs, one with all CPUs per CPU-only node.

    Args:
        nodes: As ``ray.nodes()`` gives them.
        available: Free resources, by node id; None takes all that the nodes have. Resources that the driver, a
            Tune trial or another job holds are not free, and are left to them.

    Returns:
        The slots, those with a GPU first, in the order of the nodes.

    Raises:
        ResourceError: Nothing is free.
    """
    gpu_slots: list[SlotSpec] = []
    cpu_slots: list[SlotSpec] = []
    for node in (n for n in nodes if n.get("Alive", True)):
        total = node.get("Resources", {})
        free = total if available is None else available.get(node["NodeID"], {})
        cpus, gpus = int(free.get("CPU", 0)), int(free.get("GPU", 0))
        if total.get("GPU", 0) > 0:
            each = cpus // gpus if gpus and cpus >= gpus else (cpus / gpus if gpus else 0)
            bundle = {"GPU": 1.0} | ({"CPU": float(each)} if each else {})
            gpu_slots += [_auto_slot(bundle, node["NodeID"])] * gpus
        elif cpus > 0:
            cpu_slots.append(_auto_slot({"CPU": float(cpus)}, node["NodeID"]))
    if not gpu_slots and not cpu_slots:
        raise ResourceError(
            f"workers='auto' found no free CPU or GPU on the cluster's {len(nodes)} nodes "
            f"({describe_nodes(shapes_of(nodes))}). Stop what holds them (`ray status` lists it), add a node, or "
            "write workers=[WorkerSpec(count=1, resources={'CPU': 1})] to wait for one."
        )
    return gpu_slots + cpu_slots


def _auto_slot(resources: Resources, node_id: str) -> SlotSpec:
    return SlotSpec(resources=resources, node_id=node_id, origin="workers='auto'")


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Ray's label selectors: ``v``, ``!v``, ``in(a,b)``, ``!in(a,b)``."""
    for key, wanted in selector.items():
        negate, wanted = wanted.startswith("!"), wanted.removeprefix("!")
        inside = wanted.startswith("in(") and wanted.endswith(")")
        choices = [w.strip() for w in wanted[3:-1].split(",")] if inside else [wanted]
        if (labels.get(key) in choices) == negate:
            return False
    return True


def fits(resources: Mapping[str, float], node: Mapping[str, float]) -> bool:
    """Whether a node with these resources holds the bundle."""
    return all(node.get(name, 0) + 1e-9 >= amount for name, amount in resources.items())


def check_feasible(slots: Sequence[SlotSpec], shapes: Sequence[NodeShape]) -> None:
    """Refuse slots that the nodes can never hold, even if nothing else runs on them.

    Args:
        slots: The slots of the run.
        shapes: The live nodes, and those that the autoscaler may add.

    Raises:
        ResourceError: It names the spec, the resource and what the cluster has.
    """
    for slot in slots:
        _check_fits_some_node(slot, shapes)
    if any(shape.max_count is None for shape in shapes):
        return
    for name in sorted({name for slot in slots for name in slot.resources}):
        wanted = sum(slot.resources.get(name, 0) for slot in slots)
        have = sum(shape.resources.get(name, 0) * (shape.max_count or 0) for shape in shapes)
        if wanted > have + 1e-9:
            raise ResourceError(
                f"{_origins(slots)}: {len(slots)} workers ask for {_number(wanted)} {name} together, the cluster has "
                f"{_number(have)} ({describe_nodes(shapes)}). Lower count, write fewer {name} in resources, or add "
                "nodes."
            )
    if not _packs(slots, shapes):
        raise ResourceError(
            f"{_origins(slots)}: {len(slots)} workers do not fit on the cluster's nodes together "
            f"({describe_nodes(shapes)}), though each alone does: no node can lend another its resources. Lower "
            "count, or write smaller resources."
        )


def _check_fits_some_node(slot: SlotSpec, shapes: Sequence[NodeShape]) -> None:
    if any(fits(slot.resources, s.resources) and matches(s.labels, slot.selector()) for s in shapes):
        return
    labelled = [s for s in shapes if matches(s.labels, slot.selector())]
    asked = _bundle(slot.resources)
    if not labelled:
        raise ResourceError(
            f"{slot.origin}: labels={slot.labels!r} match no node of the cluster "
            f"({describe_nodes(shapes, labels=True)}). Write labels that a node has, or start one with: "
            "ray start --labels key=value"
        )
    short = [
        f"{name}: {_number(amount)} (the most any one node has is "
        f"{_number(max(s.resources.get(name, 0) for s in labelled))})"
        for name, amount in slot.resources.items()
        if not any(fits({name: amount}, s.resources) for s in labelled)
    ]
    what = f"too much {', '.join(short)}" if short else "a combination that no one node has"
    raise ResourceError(
        f"{slot.origin}: resources={asked} can be satisfied by no node: it asks for {what}. The cluster has "
        f"{describe_nodes(labelled)}. Write resources within one of these, or add such a node."
    )


def num_fitting(slots: Sequence[SlotSpec], shapes: Sequence[NodeShape], limit: int = 1000) -> int:
    """How many copies of a run's slots the nodes hold at once; up to ``limit``, and at least one."""
    most = limit
    if all(shape.max_count is not None for shape in shapes):
        for name in {name for slot in slots for name in slot.resources}:
            wanted = sum(slot.resources.get(name, 0) for slot in slots)
            have = sum(shape.resources.get(name, 0) * (shape.max_count or 0) for shape in shapes)
            most = min(most, int((have + 1e-9) / wanted) if wanted else limit)
    finite = [dataclasses.replace(s, max_count=limit * len(slots)) if s.max_count is None else s for s in shapes]
    count = 1
    while count < most and _packs([*slots] * (count + 1), finite):
        count += 1
    return count


def _packs(slots: Sequence[SlotSpec], shapes: Sequence[NodeShape]) -> bool:
    """Whether an assignment of slots to nodes exists (backtracking; True when the search grows too long)."""
    nodes = [(dict(s.resources), s.labels) for s in shapes for _ in range(min(s.max_count or 0, len(slots)))]
    order = sorted(slots, key=scarcity)
    tried = 0

    def place(i: int) -> bool:
        nonlocal tried
        if i == len(order):
            return True
        seen: list[Resources] = []
        for free, labels in nodes:
            if not fits(order[i].resources, free) or not matches(labels, order[i].selector()) or free in seen:
                continue
            tried += 1
            if tried > _SEARCH_LIMIT:
                return True
            if not order[i].labels and order[i].node_id is None:
                seen.append(dict(free))
            for name, amount in order[i].resources.items():
                free[name] -= amount
            if place(i + 1):
                return True
            for name, amount in order[i].resources.items():
                free[name] += amount
        return False

    return place(0)


def scarcity(slot: SlotSpec) -> tuple[float, ...]:
    """A sort key: slots that fewer nodes can hold come first. So a CPU worker does not take a GPU node's CPUs."""
    r = slot.resources
    special = sum(amount for name, amount in r.items() if name not in ("CPU", "GPU", "memory"))
    return (-r.get("GPU", 0), -special, -len(slot.labels), -r.get("CPU", 0))


def without_node(slot: SlotSpec) -> SlotSpec:
    """The same slot without its node: it may be on any node."""
    return dataclasses.replace(slot, node_id=None)


def describe_nodes(shapes: Sequence[NodeShape], *, labels: bool = False) -> str:
    """A short line that lists what the nodes have."""
    parts = []
    for s in shapes[:8]:
        shown = {k: v for k, v in s.resources.items() if not k.startswith(("node:", "object_store_memory"))}
        text = f"{s.name} {_bundle(shown)}"
        if labels:
            text += f" labels { ({k: v for k, v in s.labels.items() if k != NODE_ID_LABEL})!r}"
        if s.max_count != 1:
            text += " x any number" if s.max_count is None else f" x {s.max_count}"
        parts.append(text)
    more = f", and {len(shapes) - 8} more" if len(shapes) > 8 else ""
    return ", ".join(parts) + more if parts else "no nodes"


def _origins(slots: Sequence[SlotSpec]) -> str:
    names = sorted({slot.origin for slot in slots})
    return names[0] if len(names) == 1 else "workers"


def _bundle(resources: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{k!r}: {_number(v)}" for k, v in sorted(resources.items())) + "}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"
