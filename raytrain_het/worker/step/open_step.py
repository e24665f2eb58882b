"""A step under way, and what a worker has done in its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raytrain_het.allreduce.jobs import StepJob
from raytrain_het.allreduce.step_summary import StepSummary
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.record import Record
from raytrain_het.worker.state.replica_check import Look
from raytrain_het.worker.step.timings import CpuSplit


@dataclass(kw_only=True)
class OpenStep:
    """A step under way."""

    record: Record
    """The generation that it was opened in."""
    rank: int
    """This worker's in it."""
    cursor: Cursor
    """The position before it."""
    batch: range
    """The global batch: places in the epoch's permutation."""
    own: range
    """This worker's slice of it; empty with a share of 0."""
    micro: list[range]
    """The passes: one run of the loop's body each."""
    job: StepJob
    """Its all-reduce."""
    started: float
    loss_scale: float = 1.0
    """What this worker's loss is multiplied by."""

    weights: list[float] = field(default_factory=list)
    """By pass so far; 0 for one that does not count."""
    contributes: bool = False
    """Whether this worker's passes are part of the sums."""
    inputs: Any = None
    """The batch of the pass under way."""

    rehearses: bool = False
    """Whether the first pass is of the whole batch, to compare with."""
    watched: bool = False
    """Whether it is looked at whether samples of the first pass see each other."""
    looked: Look | None = None
    """What was looked at of the replica when it was opened."""

    summary: StepSummary | None = None
    """What all members' headers say, once the means are here."""
    settled: bool = False
    """Whether the last backward pass is over and it is known what became of the step."""
    closed: bool = False
    """Whether it was committed or given up."""

    handed_over_at: float = 0.0
    """When the last bucket was handed over."""
    waited_s: float = 0.0
    """How long only peers were waited for."""
    cpu: CpuSplit = field(default_factory=CpuSplit)
    left_at: float | None = None
    """When the loop over its epoch was left after it."""
    away_s: float = 0.0
    """How long the loop was left: for the epoch's confirmation, evaluation, reports."""

    @property
    def number(self) -> int:
        """Steps that are committed once it is."""
        return self.cursor.step + 1

    @property
    def gradient_weight(self) -> float:
        """``r_i``: by which this worker's gradients are weighed beside its samples."""
        return self.record.gradient_weights[self.rank]

    @property
    def weight(self) -> float:
        """That of all passes so far together."""
        return float(sum(self.weights))

    @property
    def is_alone(self) -> bool:
        """Whether one worker does it in one pass, as one process would."""
        return len(self.record.members) == 1 and len(self.micro) == 1


@dataclass
class Counters:
    """What this worker has done since it started. Seconds, bytes, samples."""

    samples: int = 0
    steps: int = 0
    skipped: int = 0
    redone: int = 0
    uncounted: int = 0
    """Times that the loop's body ran on samples that do not count: stand-ins, a step that was done again, a whole batch
    to compare with."""
    compute_s: float = 0.0
    wait_s: float = 0.0
