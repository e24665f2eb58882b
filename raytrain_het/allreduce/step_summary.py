"""What a step's headers say of it, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytrain_het.allreduce.header import Header
from raytrain_het.membership.record import Member


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """What a step's all-reduce has brought besides the means, the same on every member."""

    step: int
    total_weight: float = 0.0
    """The sum of the contributing members' weights."""
    finite: bool = True
    """False if a contributing gradient was not finite: the update is skipped, by all alike."""
    nonfinite_slots: Sequence[int] = ()
    """Whose it was."""
    used: Sequence[int] = ()
    """By bucket: bit ``k`` is set if any contributing member had a gradient for tensor ``k``."""
    want: int = 0
    """The highest generation number that any member was told of."""
    replicas_differ: bool = False
    """Whether a comparison of replicas was due, and has found a difference."""
    losses_differ: bool = False
    """Whether members' losses are means over different numbers."""

    @property
    def applies(self) -> bool:
        """Whether there is an update to apply."""
        return self.finite and self.total_weight > 0


class SummarySoFar:
    """Collects them while a step's buckets travel. Used by the communication thread.

    Args:
        step: which one.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._total_weight = 0.0
        self._want, self._replicas_differ, self._losses_differ = 0, False, False
        self._nonfinite_slots: list[int] = []
        self._used: dict[int, int] = {}
        """By bucket. Those that take fewer operations may come before others."""

    def note(self, header: Header, members: Sequence[Member]) -> None:
        """What all members say of a bucket, merged.

        Args:
            header: of the bucket.
            members: of the generation, by rank.
        """
        if header.bucket == 0:
            self._total_weight = header.weight
        self._want = max(self._want, header.want)
        self._replicas_differ |= header.replicas_differ
        self._losses_differ |= header.losses_differ
        self._used[header.bucket] = header.used
        for rank, member in enumerate(members):
            if header.nonfinite >> rank & 1 and member.slot not in self._nonfinite_slots:
                self._nonfinite_slots.append(member.slot)

    def all(self) -> StepSummary:
        """All buckets are noted."""
        return StepSummary(
            step=self.step,
            total_weight=self._total_weight,
            finite=not self._nonfinite_slots,
            nonfinite_slots=tuple(self._nonfinite_slots),
            used=tuple(self._used[bucket] for bucket in sorted(self._used)),
            want=self._want,
            replicas_differ=self._replicas_differ,
            losses_differ=self._losses_differ,
        )
