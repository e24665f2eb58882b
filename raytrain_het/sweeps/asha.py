"""ASHA that remembers ended trials when a sweep is resumed. Tune's own forgets them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler

from raytrain_het.sweeps.ledger import results_before


class RememberingASHA(ASHAScheduler):
    """Adds the results of a trial that has ended to the rungs, when Tune adds the trial again."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Tune's hook for a new trial, or for one from before the resume."""
        super().on_trial_add(tune_controller, trial)
        for epoch, value in results_before(trial.trial_id):
            known = SimpleNamespace(trial_id=trial.trial_id)
            self._trial_info[trial.trial_id].on_result(known, epoch, self._metric_op * value)
