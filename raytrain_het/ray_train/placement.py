"""A placement group for every slot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import ray
from ray.train.v2._internal.execution.worker_group.placement_group_handle import PlacementGroupHandle
from ray.types import ObjectRef
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from raytrain_het.ray_train.resources import SlotSpec, scarcity, without_node


class SlotPlacement(PlacementGroupHandle):
    """The placement groups of all slots, as the one handle that Ray Train expects.

    Args:
        slots: What each slot needs.
        on_created: Called with every group that is made, now and later: a cleaner has to know all of them.
    """

    def __init__(self, slots: Sequence[SlotSpec], on_created: Callable[[PlacementGroup], None]) -> None:
        self._specs = list(slots)
        self._on_created = on_created
        self._lock = threading.Lock()
        self._closed = False
        self.groups: list[PlacementGroup | None] = [None] * len(self._specs)
        # The slots that fewest nodes can hold come first: Ray places groups in this order.
        for slot in sorted(range(len(self._specs)), key=lambda i: scarcity(self._specs[i])):
            self.request(slot)

    def request(self, slot: int) -> PlacementGroup | None:
        """Ask Ray for the slot's group, unless there is one; returns the group, or None if the run is over."""
        with self._lock:
            if self._closed or self.groups[slot] is not None:
                return self.groups[slot]
            spec = self._specs[slot]
            selector = spec.selector()
            group = placement_group(
                [dict(spec.resources)],
                strategy="STRICT_PACK",
                bundle_label_selector=[selector] if selector else None,
            )
            self.groups[slot] = group
        self._on_created(group)
        return group

    def give_up_node(self, slot: int) -> None:
        """Remove the group of a slot whose node is gone. The next group may be on any node."""
        with self._lock:
            group, self.groups[slot] = self.groups[slot], None
            self._specs[slot] = without_node(self._specs[slot])
        if group is not None:
            remove_placement_group(group)

    def node_of(self, slot: int) -> str | None:
        """The node that holds the slot's group, or None while it waits."""
        group = self.groups[slot]
        if group is None:
            return None
        table = placement_group_table(group)
        if table.get("state") != "CREATED":
            return None
        return table.get("bundles_to_node_id", {}).get(0)

    @property
    def id(self) -> str:
        """The groups' ids, for log lines of Ray's callbacks."""
        return ",".join(group.id.hex() for group in self.groups if group is not None)

    @property
    def placement_group(self) -> SlotPlacement:
        """Itself: Ray's callbacks only use the ``id`` of a group."""
        return self

    def ready(self) -> ObjectRef:
        refs = [group.ready() for group in self.groups if group is not None]
        return ray.remote(num_cpus=0)(lambda *_: True).remote(*refs)

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Wait until all groups are placed."""
        deadline = time.monotonic() + timeout_seconds
        for group in self.groups:
            if group is None or not group.wait(max(0.0, deadline - time.monotonic())):
                return False
        return True

    def shutdown(self) -> None:
        with self._lock:
            self._closed = True
            groups, self.groups = self.groups, [None] * len(self.groups)
        for group in groups:
            if group is not None:
                remove_placement_group(group)
