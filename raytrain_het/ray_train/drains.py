"""Nodes that Ray takes away: their workers leave in good order, and their slots are filled on other nodes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from raytrain_het.ray_train.cluster_view import draining_nodes
from raytrain_het.ray_train.hub import HubActor
from raytrain_het.ray_train.slots import Slot, SlotState

_LOOK_S = 1.0


class Drains:
    """Looks now and then which nodes are drained.

    Args:
        hub: Told of the slots on them, until their workers have left.
    """

    def __init__(self, hub: HubActor) -> None:
        self._hub, self._looked_at = hub, time.monotonic()

    def tell(self, slots: Sequence[Slot]) -> None:
        """To be called at every poll."""
        if time.monotonic() - self._looked_at < _LOOK_S:
            return
        self._looked_at, nodes = time.monotonic(), draining_nodes()
        for slot in slots:
            if slot.state is SlotState.LIVE and slot.worker is not None and slot.worker.metadata.node_id in nodes:
                self._hub.slot_drains(slot.index, f"node {slot.worker.metadata.node_id[:8]} is being drained")
