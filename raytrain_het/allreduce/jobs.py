"""What the training thread asks of the communication thread. Every member does the same jobs in the same order."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from raytrain_het.allreduce.sums import Sums


@dataclass(eq=False)
class Job:
    """Something all members do together in one generation."""

    generation: int
    step: int
    outcome: str | None = None
    """None until it is over; then "done" or "aborted"."""
    error: BaseException | None = None

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.outcome is not None


@dataclass(eq=False)
class StepJob(Job):
    """One step's all-reduce. Buckets are filled by the training thread, in layout order."""

    locals: list[torch.Tensor | None] | None = None
    """Weighted local gradients by bucket (n,); None where they were gathered in the message, or this member sends
    nothing."""
    outs: list[torch.Tensor] = field(default_factory=list)
    """Where the decoded means go, by bucket (n,)."""
    ready: int = 0
    """So many buckets, from the first on, may be sent."""
    ready_at: float = 0.0
    """When the last bucket was, by the monotonic clock."""
    weight: float = 0.0
    num_samples: int = 0
    """Those of the whole step, all members'; 0 for one that only follows."""
    contributes: bool = False
    finite: list[bool] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    digest: int = 0
    numbers: int = 0
    loss: int = 0
    resync_due: bool = False
    """Whether parameters are sent anew after this step, if members turn out to differ."""
    sums: Sums | None = None
    epoch: int = 0
    """That the step belongs to."""
    waited_s: float = 0.0
    """Time spent waiting for peers after this member had given its last bucket."""


@dataclass(eq=False)
class ConfirmJob(Job):
    """All say that they have committed the step. ``want`` is the highest number any of them knows of."""

    want: int = 0


@dataclass(eq=False)
class ResyncJob(Job):
    """One member's parameters are sent to all others."""

    data: torch.Tensor | None = None
