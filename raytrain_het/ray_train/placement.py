"""A placement group for every slot, and their removal whatever happens to the controller."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import ray
from ray._private.state import state as ray_state
from ray.train.v2._internal.execution.worker_group.placement_group_handle import PlacementGroupHandle
from ray.types import ObjectRef
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from raytrain_het.ray_train.resources import SlotSpec, pin_lost, scarcity

logger = logging.getLogger(__name__)


class SlotPlacement(PlacementGroupHandle):
    """The placement groups of all slots, as the one handle that Ray Train expects.

    Args:
        slots: What each slot needs.
        on_created: Told of every group made, now and later, so that a cleaner knows all of them.
    """

    def __init__(self, slots: Sequence[SlotSpec], on_created: Callable[[PlacementGroup], None]) -> None:
        self._specs = list(slots)
        self._on_created = on_created
        self._lock = threading.Lock()
        self._closed = False
        self.groups: list[PlacementGroup | None] = [None] * len(self._specs)
        # The scarcest first: Ray places in the order it is asked.
        for slot in sorted(range(len(self._specs)), key=lambda i: scarcity(self._specs[i])):
            self.request(slot)

    def request(self, slot: int) -> PlacementGroup | None:
        """Ask for the slot's group, unless it is there or the run is over."""
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
        """The slot's node is gone: remove its group; the next one may be anywhere."""
        with self._lock:
            group, self.groups[slot] = self.groups[slot], None
            self._specs[slot] = pin_lost(self._specs[slot])
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
        """For log lines of Ray's callbacks."""
        return ",".join(group.id.hex() for group in self.groups if group is not None)

    @property
    def placement_group(self) -> SlotPlacement:
        """Itself: whoever wants one group wants something with an ``id``."""
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


class PlacementCleaner:
    """A detached actor that removes a run's placement groups if its controller dies.

    Ray's own knows one group per run and needs the dashboard's State API; this one knows all of
    them and asks the control store directly.
    """

    def __init__(self, controller_actor_id: str, interval_s: float = 1.0) -> None:
        self._controller = controller_actor_id
        self._groups: list[PlacementGroup] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, args=(interval_s,), name="placement-cleaner", daemon=True).start()

    def register(self, groups: list[PlacementGroup]) -> None:
        with self._lock:
            self._groups += groups

    def _watch(self, interval_s: float) -> None:
        while ray_state.actor_table(self._controller).get("State") not in ("DEAD", None):
            time.sleep(interval_s)
        time.sleep(interval_s)  # a registration under way
        with self._lock:
            for group in self._groups:
                try:
                    if placement_group_table(group).get("state", "REMOVED") != "REMOVED":
                        remove_placement_group(group)
                except Exception:
                    logger.warning("A placement group of a dead run could not be removed.", exc_info=True)
        ray.kill(ray.get_runtime_context().current_actor)
