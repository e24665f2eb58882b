"""The score policy ``memory_bandwidth``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytrain_het.score_policies.base import ScorePolicy

if TYPE_CHECKING:
    from raytrain_het.balance.profile import Profile


class MemoryBandwidth(ScorePolicy):
    """Bytes per second that a copy within the device's memory reads and writes."""

    name = "memory_bandwidth"
    needs = "the memory's bandwidth"

    def score(self, profile: Profile, share: float) -> float | None:
        return None if profile.memory_bandwidth is None else profile.memory_bandwidth.median
