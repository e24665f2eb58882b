"""The score policy ``train_step``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytrain_het.score_policies.base import ScorePolicy

if TYPE_CHECKING:
    from raytrain_het.balance.profile import Profile


class TrainStep(ScorePolicy):
    """``b / t(b)``: samples per second of the model's own training step, at an equal share ``b``."""

    name = "train_step"
    needs = "the model's own training step"
    measured_by = "raytrain-het probe --model JOB.yaml"
    from_hardware = False

    def score(self, profile: Profile, share: float) -> float | None:
        return None if profile.step is None else share / profile.step.step_s(share)
