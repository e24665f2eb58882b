"""Tune's ASHA, which forgets what it has seen when a sweep is resumed, and this one, which does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler

from raytrain_het.sweeps.ledger import results_before


class RememberingASHA(ASHAScheduler):
    """A trial that ended before is told to the rungs again, when Tune puts it on its list."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Tune's: a new trial, or one of before."""
        super().on_trial_add(tune_controller, trial)
        for epoch, value in results_before(trial.trial_id):
            known = SimpleNamespace(trial_id=trial.trial_id)
            self._trial_info[trial.trial_id].on_result(known, epoch, self._metric_op * value)
