"""What the training thread and the communication thread hand each other.

A *job* is a ticket: it says what all members do together next. The training thread puts in its contribution, once, and
its buckets as they become full. The communication thread puts in the result, which ends the job. Nobody replaces what
is there. Tensors change hands with it: a bucket's values belong to the communication thread until the job is over, and
the means to the training thread after it. Every member does the same jobs in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from raytrain_het.allreduce.reducers import SendBuffer
from raytrain_het.allreduce.step_summary import StepSummary
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.message_parts import Paths
from raytrain_het.membership.record import Record

SendBuffers = Sequence[list[SendBuffer] | None]
"""By bucket: the places in its outgoing message where a gradient can be gathered, so that nothing is left to encode;
None where it cannot."""


# -------------------------------------------------------------------- from the training thread


class Contribution(NamedTuple):
    """What this member says of its part of a step. It is fixed before the step's first bucket is sent."""

    means: Sequence[torch.Tensor] = ()
    """By bucket: where the communication thread writes the step's mean (n,). Nobody else writes there before the job is
    over; then they are the training thread's."""
    weight: float = 0.0
    """The weight ``w_i`` of its gradients."""
    contributes: bool = False
    """False with an empty share, or a weight of 0: its payload is dropped."""
    digest: int = 0
    """Of a part of its replica when the step was opened; 0 where no comparison is due."""
    numbers: int = 0
    """Digest of the settings and numbers that it goes by in this step; 0 where none is due."""
    loss: int = 0
    """What its loss is a mean over, as 16 bits; 0 where that is not known."""


class LocalBucket(NamedTuple):
    """A bucket of this member's weighted gradients, full."""

    values: torch.Tensor | None = None
    """(n,); None where it was gathered in the message, or this member sends nothing. The communication thread may write
    over it."""
    finite: bool = True
    used: int = 0
    """Bit ``k`` is set if tensor ``k`` of the bucket has a gradient."""


# -------------------------------------------------------------------- from the communication thread


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a job has ended."""

    done: bool = True
    """False if the generation was voided meanwhile: the step is resolved in the next one."""
    error: BaseException | None = None
    """What the training function gets to see."""


ABORTED = Result(done=False)


@dataclass(frozen=True, kw_only=True)
class StepResult(Result):
    """What the all-reduce of a step has brought."""

    summary: StepSummary
    means: Sequence[torch.Tensor]
    """By bucket: the weighted mean over all members (n,)."""
    send_buffers: SendBuffers | None
    """Those of the next step."""
    waited_s: float = 0.0
    """Time that was spent waiting for peers after this member had given its last bucket."""
    paths: Paths | None = None
    """What was seen of the ways to peers since the last step, if anything."""
    errors: Sequence[tuple[str, float]] = ()
    """Codecs, and what they were seen to lose."""


@dataclass(frozen=True, kw_only=True)
class ConfirmResult(Result):
    """All have committed the step."""

    want: int
    """The highest generation number that any of them was told of."""


@dataclass(frozen=True, kw_only=True)
class Entered:
    """A generation whose group stands, and what the communication thread has done to enter it."""

    record: Record
    replayed: tuple[StepSummary, Sequence[torch.Tensor]] | None
    """The summary of the base step, and its means by bucket, where this member had missed them."""
    send_buffers: SendBuffers | None
    """Those of the generation's first step."""


class BytesMoved(NamedTuple):
    """Bytes to and from other members since the worker has started, headers included."""

    sent: int = 0
    received: int = 0


# -------------------------------------------------------------------- the tickets


@dataclass(eq=False)
class Job:
    """Something all members do together in one generation."""

    generation: int
    step: int
    result: Result | None = None

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.result is not None

    @property
    def aborted(self) -> bool:
        """Whether it has ended without a result."""
        return self.result is not None and not self.result.done


@dataclass(eq=False)
class StepJob(Job):
    """One step's all-reduce. The training thread fills buckets in layout order while earlier ones travel."""

    cursor: Cursor = field(default_factory=Cursor)
    """The position before the step."""
    num_samples: int = 0
    """Those of the whole step, all members'; 0 for one that only follows."""
    step_s: float = 0.0
    """How long a step usually takes; 0 where that is not known. Deadlines follow from it."""
    contribution: Contribution | None = None
    buckets: list[LocalBucket] = field(default_factory=list)
    """The full ones, from the first on: so many may be sent."""
    all_full_at: float = 0.0
    """When the last one was, by the monotonic clock; 0 before."""

    def hand_over(self, contribution: Contribution, buckets: Sequence[LocalBucket], *, last: bool) -> None:
        """These buckets are full too. The contribution of the first call counts."""
        if self.contribution is None:
            self.contribution = contribution
        if last:
            self.all_full_at = time.monotonic()
        self.buckets.extend(buckets)

    @property
    def summary(self) -> StepSummary | None:
        """Those that the step has brought, if it is done."""
        return self.result.summary if isinstance(self.result, StepResult) else None


@dataclass(eq=False)
class ConfirmJob(Job):
    """All say that they have committed the step."""


@dataclass(eq=False)
class ResyncJob(Job):
    """One member's parameters are sent to all others."""

    data: torch.Tensor | None = None
    """The sender's parameters, or where they land, as bytes; None on a member that only takes part."""
