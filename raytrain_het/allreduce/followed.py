"""The steps that pass while a worker heals: their means are kept for the replay on its snapshot."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.step_summary import StepSummary
from raytrain_het.membership.cursor import Cursor

KEPT_BYTES = 2**30
"""So much of the steps is kept, the oldest dropped first; two steps in any case."""
_BYTES_BESIDES = 4096
"""About what keeping a step costs besides its means."""


class FollowedStep(NamedTuple):
    """One step that this member has followed without a share."""

    summary: StepSummary
    means: Sequence[torch.Tensor]
    """By bucket (n,)."""
    after: Cursor
    """The position after it."""


class FollowedSteps:
    """A bounded queue. The communication thread appends, the training thread takes, both under one condition.

    Args:
        layout: says how large a step's means are.
        condition: notified when a step has come.
    """

    def __init__(self, layout: Layout, condition: threading.Condition) -> None:
        kept = sum(b.numel * b.dtype.itemsize for b in layout.buckets) + _BYTES_BESIDES
        self._steps: deque[FollowedStep] = deque(maxlen=max(2, KEPT_BYTES // kept))
        self._condition = condition
        self.cursor: Cursor | None = None
        """The position up to which steps were followed; None before the first."""
        self.num_starts = 0
        """Grows whenever following starts anew."""

    def __len__(self) -> int:
        return len(self._steps)

    # ---------------------------------------------------------------- the communication thread's side

    def start_at(self, cursor: Cursor) -> None:
        """A generation goes on from here: what was followed so far is dropped, unless it leads here."""
        if self.cursor != cursor:
            with self._condition:
                self._steps.clear()
                self.cursor = cursor
                self.num_starts += 1

    def append(self, step: FollowedStep) -> None:
        """One more step is over."""
        with self._condition:
            self._steps.append(step)
            self.cursor = step.after
            self._condition.notify_all()

    # ---------------------------------------------------------------- the training thread's side

    def first_after(self, step: int) -> int | None:
        """The first kept step behind ``step``; those up to it are dropped."""
        with self._condition:
            while self._steps and self._steps[0].after.step <= step:
                self._steps.popleft()
            return self._steps[0].after.step if self._steps else None

    def take(self, step: int) -> FollowedStep | None:
        """This step, unless it was dropped meanwhile."""
        with self._condition:
            return self._steps.popleft() if self._steps and self._steps[0].after.step == step else None

    def reach_beyond(self, step: int) -> bool:
        """Whether a step behind this one waits for its replay."""
        with self._condition:
            return any(followed.after.step > step for followed in self._steps)

    def clear(self) -> None:
        """Nothing is to be replayed any more."""
        with self._condition:
            self._steps.clear()
