"""What a step's headers say of it, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Bucket
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
    digests: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """By rank: those of tensors and of numbers, if a comparison of replicas was due."""
    losses_differ: bool = False
    """Whether members' losses are means over different numbers."""

    @property
    def applies(self) -> bool:
        """Whether there is an update to apply."""
        return self.finite and self.total_weight > 0

    @property
    def replicas_differ(self) -> bool:
        """Whether a comparison was due and has found a difference. The same on all members."""
        return len(set(self.digests.values())) > 1


class SummarySoFar:
    """Collects them while a step's buckets travel. Used by the communication thread.

    Args:
        step: which one.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.total_weight = 0.0
        """The sum of the contributing members' weights, from the first bucket's headers on."""
        self._finite, self._want, self._losses_differ = True, 0, False
        self._nonfinite_slots: list[int] = []
        self._used: list[int] = []
        self._digests: dict[int, tuple[int, int]] = {}

    def note(self, bucket: Bucket, headers: Sequence[Header], members: Sequence[Member]) -> None:
        """The headers of one bucket, by rank."""
        contributing = [(rank, h) for rank, h in enumerate(headers) if h.contributes]
        if bucket.index == 0:
            self.total_weight = float(sum(h.weight for _, h in contributing))
            self._losses_differ = len({h.loss for _, h in contributing if h.loss}) > 1
            self._digests = {rank: (h.digest, h.numbers) for rank, h in enumerate(headers) if h.digest}
        self._want = max(self._want, *(h.want for h in headers))
        used = 0
        for rank, header in contributing:
            used |= header.used
            if not header.finite:
                self._finite = False
                slot = members[rank].slot
                if slot not in self._nonfinite_slots:
                    self._nonfinite_slots.append(slot)
        self._used.append(used)

    def all(self) -> StepSummary:
        """All headers are here."""
        return StepSummary(
            step=self.step,
            total_weight=self.total_weight,
            finite=self._finite,
            nonfinite_slots=tuple(self._nonfinite_slots),
            used=tuple(self._used),
            want=self._want,
            digests=self._digests,
            losses_differ=self._losses_differ,
        )
