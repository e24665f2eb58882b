"""Updates that are skipped, since some worker's gradient was not finite or no sample counted."""

from __future__ import annotations

import logging

import torch

from raytrain_het.allreduce.step_summary import StepSummary
from raytrain_het.errors import NonFiniteGradientError
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.events import Skipped
from raytrain_het.membership.protocol import Event
from raytrain_het.worker.data.data_plan import DataPlan
from raytrain_het.worker.step.gradients import Gradients
from raytrain_het.worker.step.open_step import Counters, OpenStep

logger = logging.getLogger("raytrain_het")


class Skips:
    """Counts them, and says on which worker, in which parameters and samples.

    Args:
        agent: tells the hub.
        gradients: whose parameters are named.
        plan: which samples are where.
        most_in_a_row: after so many the run ends; 0 never ends it.
    """

    def __init__(self, agent: MemberAgent, gradients: Gradients, plan: DataPlan, most_in_a_row: int) -> None:
        self._agent, self._gradients, self._plan = agent, gradients, plan
        self._most_in_a_row, self._in_a_row = most_in_a_row, 0

    def note(self, step: OpenStep, summary: StepSummary, counters: Counters) -> None:
        """A step was committed, with or without an update.

        Raises:
            NonFiniteGradientError: too many in a row came without one.
        """
        if summary.applies:
            self._in_a_row = 0
            return
        counters.skipped += 1
        self._in_a_row += 1
        slot = self._agent.member.slot
        text = f"workers {list(summary.nonfinite_slots)}" if summary.nonfinite_slots else "a peer"
        if summary.finite:
            text = "the weights of the whole batch are 0, see prepare_data_loader(weight=)"
            logger.warning("step %d: %s; the update is skipped", step.number, text)
        if slot in summary.nonfinite_slots:
            names = self._gradients.nonfinite_parameters()
            text = f"worker {slot}, parameters {names[:3]}{self._bad_samples(step)}"
            logger.warning("step %d: gradient not finite on %s; the update is skipped", step.number, text)
            self._agent.tell(Event(event=Skipped(step=step.number, parameters=names[:10])))
        limit = self._most_in_a_row
        if limit and self._in_a_row >= limit:
            raise NonFiniteGradientError(
                f"{limit} updates in a row were skipped for want of finite gradients, the last at step "
                f"{step.number} ({text}). Lower the learning rate, look for NaNs in the data, or raise "
                f"HetConfig(max_skipped_steps={limit})."
            )

    def _bad_samples(self, step: OpenStep) -> str:
        tensors = step.inputs if isinstance(step.inputs, list | tuple) else [step.inputs]
        indices = step.micro[-1]
        order = self._plan.permutation(step.cursor.epoch)
        for t in tensors:
            if isinstance(t, torch.Tensor) and t.is_floating_point() and t.shape[:1] == (len(indices),):
                bad = (~torch.isfinite(t.reshape(len(t), -1))).any(dim=1).nonzero().flatten().tolist()
                if bad:
                    return f" (the data is not finite: samples {[int(order[indices[k]]) for k in bad[:5]]})"
        return ""
