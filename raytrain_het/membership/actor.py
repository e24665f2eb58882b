"""The membership actor: a hub inside a Ray actor, which Ray restarts when its process dies."""

from __future__ import annotations

from typing import Any

from raytrain_het.membership.server import Hub
from raytrain_het.membership.settings import HubSettings


class MembershipActor:
    """Thin on purpose: Ray gives it a process, restarts and an address; the work is in :class:`Hub`."""

    def __init__(self, settings: HubSettings) -> None:
        self._hub = Hub(settings)

    def address(self) -> dict[str, Any]:
        """Where the members' connections go, and the token they show."""
        return self._hub.address()

    def slot_lost(self, slot: int, reason: str) -> None:
        """Ray's word that the worker in a slot is dead."""
        self._hub.slot_lost(slot, reason)

    def slot_vacant(self, slot: int, reason: str) -> None:
        """Nobody will come for this slot for now."""
        self._hub.slot_vacant(slot, reason)

    def take_reports(self) -> list[dict[str, Any]]:
        """Whole reports that were not acknowledged yet, oldest first."""
        return self._hub.take_reports()

    def acknowledge(self, keys: list[str]) -> None:
        """Those reports are registered; the workers may forget them."""
        self._hub.acknowledge(keys)

    def reports(self, since: int) -> list[dict[str, Any]]:
        """All whole reports with a sequence number of ``since`` or more."""
        return self._hub.reports(since)

    def events(self, since: int) -> list[dict[str, Any]]:
        """Membership events with a sequence number of ``since`` or more."""
        return self._hub.events(since)

    def status(self) -> dict[str, Any]:
        """Who takes part and how far they are."""
        return self._hub.status()

    def shutdown(self) -> None:
        """Close the hub's sockets."""
        self._hub.shutdown()
