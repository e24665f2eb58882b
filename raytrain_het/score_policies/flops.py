"""The score policy ``flops``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytrain_het.score_policies.base import ScorePolicy

if TYPE_CHECKING:
    from raytrain_het.balance.profile import Profile


class Flops(ScorePolicy):
    """Floating-point operations per second of an fp32 matrix product."""

    name = "flops"
    needs = "fp32 matrix products"

    def score(self, profile: Profile, share: float) -> float | None:
        measured = profile.flops.get("fp32")
        return None if measured is None else measured.median
