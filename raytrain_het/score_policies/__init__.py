"""Score policies by name. A new one is one file, and one line in the table.

:mod:`raytrain_het.balance.scores` applies them. ``HetConfig(score_policy=...)`` also takes any function from a profile
to a number.
"""

from __future__ import annotations

from raytrain_het.score_policies.base import ScorePolicy
from raytrain_het.score_policies.flops import Flops
from raytrain_het.score_policies.memory_bandwidth import MemoryBandwidth
from raytrain_het.score_policies.train_step import TrainStep

SCORE_POLICIES: dict[str, type[ScorePolicy]] = {
    policy.name: policy
    for policy in (
        TrainStep,
        Flops,
        MemoryBandwidth,
    )
}

__all__ = ["SCORE_POLICIES", "ScorePolicy"]
