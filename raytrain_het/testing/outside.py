"""Faults of the world outside of the workers: cables, switches, notices, a hub that dies."""

from __future__ import annotations

import time
from collections.abc import Callable

from raytrain_het.testing.cuts import cut
from raytrain_het.testing.faults import OUTSIDE, Happened, happened
from raytrain_het.testing.processes import ProcessLab


class Outside:
    """Lets the outside faults of a lab's script happen, as their workers come to them.

    Args:
        lab: Whose. For ``unplug`` and ``mute`` its machines have cables (``rates_mbit``).
    """

    def __init__(self, lab: ProcessLab) -> None:
        self._lab = lab
        self._done: set[Happened] = set()
        self._apart: dict[int, tuple[float, Callable[[int], None]]] = {}
        """By slot: until when its machine is off the network, seconds of the monotonic clock, and what ends that."""
        self._draining: dict[int, str] = {}
        """By slot whose worker was given notice: its uid."""

    def __call__(self) -> None:
        """To be called at every poll."""
        for fault in happened(self._lab.directory):
            if fault.kind in OUTSIDE and fault not in self._done:
                self._done.add(fault)
                self._begin(fault)
        for slot, (until, join) in list(self._apart.items()):
            if time.monotonic() >= until:
                del self._apart[slot]
                join(slot)
        self._tell_of_drains()

    def _begin(self, fault: Happened) -> None:
        lab, slot = self._lab, fault.slot
        if fault.kind == "cut":
            cut(lab.hub, [slot])
        elif fault.kind == "restart_hub":
            lab.restart_hub()
        elif fault.kind == "drain":
            uids = [m["uid"] for m in lab.hub.status()["members"] if m["slot"] == slot]
            self._draining |= dict.fromkeys([slot], uids[0]) if uids else {}
        elif slot not in self._apart:
            network = lab.network
            assert network is not None, "the lab has cables"
            off, on = (network.unplug, network.plug_in) if fault.kind == "unplug" else (network.mute, network.unmute)
            off(slot)
            self._apart[slot] = time.monotonic() + fault.seconds, on

    def _tell_of_drains(self) -> None:
        members = {m["slot"]: m["uid"] for m in self._lab.hub.status()["members"]} if self._draining else {}
        for slot, uid in list(self._draining.items()):
            if members.get(slot) == uid:
                self._lab.hub.slot_drains(slot, "a notice")
            else:
                del self._draining[slot]
