"""The actor that removes a run's placement groups, whatever happens to its controller.

Its process imports little besides this module, and so needs little memory.
"""

from __future__ import annotations

import logging
import threading
import time

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

logger = logging.getLogger(__name__)


class PlacementCleaner:
    """A detached actor that removes a run's placement groups if its controller dies.

    Ray's own cleaner knows one group per run, and needs the dashboard's State API. This one knows all groups, and asks
    the control store directly.
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
        from ray._private.state import state as ray_state  # here, since the class travels by value

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
