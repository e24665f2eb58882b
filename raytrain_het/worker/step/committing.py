"""Update and commit: a step's last part. What follows from a commit, on this worker and together with the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from raytrain_het.allreduce.communicator import Communicator
from raytrain_het.allreduce.jobs import ResyncJob
from raytrain_het.allreduce.step_summary import StepSummary
from raytrain_het.config import HetConfig
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.events import Drift
from raytrain_het.membership.protocol import Event
from raytrain_het.membership.record import Record
from raytrain_het.worker.checks.step_checks import StepChecks
from raytrain_het.worker.data.data_plan import DataPlan
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.step.generations import Generations
from raytrain_het.worker.step.open_step import Counters, OpenStep
from raytrain_het.worker.step.skips import Skips


class Committing:
    """Used by the training thread.

    Args:
        communicator: whose codecs remember what was committed.
        generations: the right to commit, and healing, which logs the optimizer's settings for those that replay.
        replica: what is updated.
        plan: moves the cursor.
        checks: starts comparing anew when replicas were made the same.
        skips: counts the updates that were skipped.
        config: how often unlike members' parameters are sent anew.
    """

    def __init__(
        self,
        communicator: Communicator,
        generations: Generations,
        replica: Replica,
        plan: DataPlan,
        checks: StepChecks,
        skips: Skips,
        config: HetConfig,
    ) -> None:
        self.on_commit: list[Callable[[OpenStep, StepSummary], None]] = []
        self.step_s = 0.0
        """How long a step usually takes; 0 before the first one."""
        self._comm, self._generations, self._replica = communicator, generations, replica
        self._plan, self._checks, self._skips = plan, checks, skips
        self._resync_steps = config.replica_check_steps
        generations.on_enter.append(self._entered)

    def _entered(self, record: Record) -> None:
        if record.reset:
            self.step_s = 0.0

    def commit(self, step: OpenStep, summary: StepSummary, update: Callable[[], Any]) -> tuple[bool, Any]:
        """Update and move the cursor, if the step's generation is still in force.

        Returns:
            Whether it is committed, and what ``update`` has returned.
        """
        agent = self._generations.agent
        with agent.committing(step.job.generation) as allowed:
            if not allowed:
                return False, None
            result, log = None, self._generations.healing.source.log
            if summary.applies:
                log(step.number, self._replica.hyperparameters)
                result = update()
                self._comm.codec_states.commit(step.number, summary.total_weight, summary.used)
            else:
                log(step.number, lambda: None)
            agent.points.reach("updated", step.number)
            after, _ = advance(self._plan, step.cursor)
            agent.advance(after, healed=True)
            step.closed = True
        return True, result

    def after_commit(self, step: OpenStep, summary: StepSummary, counters: Counters) -> None:
        """Count the step, tell whoever listens, and do what all members do together after it: re-form, send parameters
        anew, confirm an epoch's last step."""
        generations, number = self._generations, step.job.generation
        generations.confirm_up_to(step.number - 1)
        counters.steps += 1
        counters.samples += len(step.own)
        counters.uncounted += (not step.own) + step.rehearses
        step_s = time.monotonic() - step.started
        self.step_s = step_s if self.step_s == 0 else 0.8 * self.step_s + 0.2 * step_s
        for listener in self.on_commit:
            listener(step, summary)
        self._skips.note(step, summary, counters)
        if summary.want > number:
            generations.agent.answer_want(summary.want)
        elif step.record.number == number:
            if resync_due(self._resync_steps, step.record, step.number) and summary.replicas_differ:
                self._resync(step.record, step.number)
            if generations.agent.cursor.epoch != step.cursor.epoch:
                generations.begin_confirmation(number, step.number)

    def _resync(self, record: Record, step: int) -> None:
        """The replicas differ, as they do on unlike devices: take the first healed member's parameters."""
        agent, replica = self._generations.agent, self._replica
        first = next(m.uid for m in record.members if m.uid not in record.unhealed)
        mine = first == agent.uid
        data = replica.pack_parameters() if mine else torch.zeros(replica.parameter_bytes(), dtype=torch.uint8)
        job = ResyncJob(record.number, step, data=data)
        self._comm.submit(job)
        agent.wait_for(lambda: job.over)
        if job.aborted:
            return
        self._checks.replica.replicas_are_the_same()
        if not mine:
            drift = replica.unpack_parameters(data)
            agent.tell(Event(event=Drift(step=step, largest_difference=drift)))


def resync_due(every: int, record: Record, step: int) -> bool:
    """Whether unlike members' parameters are sent anew after this step."""
    return every > 0 and step % every == 0 and record.is_unlike


def advance(plan: DataPlan, cursor: Cursor) -> tuple[Cursor, bool]:
    """The cursor after one more committed step, rolled over into the next epoch at an epoch's end, and whether it
    did."""
    after = plan.advance(cursor)
    if plan.is_epoch_end(after):
        return plan.next_epoch(after), True
    return after, False
