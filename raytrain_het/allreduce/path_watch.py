"""What a member sees of the ways to its peers, from the bytes that went there and how long they were on the way."""

from __future__ import annotations

import time

from raytrain_het.allreduce.reducers import Reducer
from raytrain_het.balance.paths import watched
from raytrain_het.membership.message_parts import Paths

LOOK_AGAIN_S = 0.5


class PathWatch:
    """Looks once in a while, between steps."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, float, float]] = []
        self._gradient_bytes = 0
        self._sent: dict[int, tuple[int, float]] = {}
        self._looked_at = 0.0

    def forget(self, *, new_group: bool) -> None:
        """A generation begins: another worker may have come to a slot; a new group counts from nothing."""
        self._seen = []
        if new_group:
            self._sent = {}

    def look(self, reducer: Reducer) -> None:
        """After a step."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_AGAIN_S or self._seen:
            return
        self._looked_at, before, members = now, self._sent, reducer.record.members
        size_before = self._gradient_bytes
        self._sent, self._gradient_bytes = reducer.group.sent(), reducer.gradient_bytes
        if size_before not in (0, self._gradient_bytes):
            return  # Some of what was sent was of another size.
        told_of = watched(reducer.rank, len(members))
        for rank, (num_bytes, busy_s) in self._sent.items():
            if rank not in told_of:
                continue
            bytes_before, busy_before_s = before.get(rank, (0, 0.0))
            gradients = (num_bytes - bytes_before) / reducer.gradient_bytes
            self._seen.append((members[rank].slot, gradients, busy_s - busy_before_s))

    def take(self) -> Paths | None:
        """What was seen since the last call, if anything: ``to``, of (slot, how many of this member's gradients went
        there, and the seconds for which some of that was on the way); and ``gradient_bytes``, of such a gradient."""
        seen, self._seen = self._seen, []
        return Paths(to=seen, gradient_bytes=self._gradient_bytes) if seen else None
