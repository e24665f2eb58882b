"""What is told of each committed step to whoever listens; the ledger is written from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raytrain_het.allreduce.step_summary import StepSummary
from raytrain_het.worker.data.data_plan import DataPlan, slice_of
from raytrain_het.worker.step.open_step import OpenStep


@dataclass
class StepRecord:
    """One committed step, as one worker saw it."""

    step: int
    """Steps committed before this one."""
    generation: int
    epoch: int
    offset: int
    batch_size: int
    slices: dict[str, list[int]]
    """By uid: [start, stop) in the epoch's permutation; empty with a share of 0."""
    uid: str
    own_samples: list[int]
    applied: bool
    digest: Callable[[], int]

    @classmethod
    def of(
        cls, step: OpenStep, summary: StepSummary, plan: DataPlan, uid: str, digest: Callable[[], int]
    ) -> StepRecord:
        """The record of a step that this worker has just committed."""
        record, order = step.record, plan.permutation(step.cursor.epoch)
        slices = {
            m.uid: [s.start, s.stop]
            for rank, m in enumerate(record.members)
            for s in (slice_of(step.batch, record.shares, rank),)
        }
        return cls(
            step=step.cursor.step,
            generation=record.number,
            epoch=step.cursor.epoch,
            offset=step.batch.start,
            batch_size=len(step.batch),
            slices=slices,
            uid=uid,
            own_samples=[int(order[k]) for k in step.own],
            applied=summary.applies,
            digest=digest,
        )
