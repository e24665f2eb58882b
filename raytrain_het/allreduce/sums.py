"""What a step's headers say of it, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Bucket
from raytrain_het.membership.record import Member


@dataclass
class Sums:
    """What a step's all-reduce has brought, the same on every member."""

    step: int
    total_weight: float = 0.0
    finite: bool = True
    """False if a contributing gradient was not finite: the update is skipped, by all alike."""
    nonfinite_slots: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    """By bucket: bit ``k`` is set if any contributing member had a gradient for tensor ``k``."""
    want: int = 0
    digests: dict[int, tuple[int, int]] = field(default_factory=dict)
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

    def note(self, bucket: Bucket, headers: Sequence[Header], members: Sequence[Member]) -> None:
        """The headers of one bucket, by rank."""
        contributing = [(rank, h) for rank, h in enumerate(headers) if h.contributes]
        if bucket.index == 0:
            self.total_weight = float(sum(h.weight for _, h in contributing))
            self.losses_differ = len({h.loss for _, h in contributing if h.loss}) > 1
            self.digests = {rank: (h.digest, h.numbers) for rank, h in enumerate(headers) if h.digest}
        self.want = max(self.want, *(h.want for h in headers))
        used = 0
        for rank, header in contributing:
            used |= header.used
            if not header.finite:
                self.finite = False
                slot = members[rank].slot
                if slot not in self.nonfinite_slots:
                    self.nonfinite_slots.append(slot)
        self.used.append(used)
