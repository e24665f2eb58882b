"""Who adds up which part of a bucket."""

from __future__ import annotations

from collections.abc import Sequence

from raytrain_het.allreduce.layout import shard_bounds
from raytrain_het.membership.record import Record

Shard = tuple[int, int]
"""(start, stop) of elements of a bucket."""

MIN_SHARD_BYTES = 2048
"""Of a message between machines: about what a packet holds. Its way costs as much as that of an empty one."""

MIN_SHARD_BYTES_ON_ONE_MACHINE = 1 << 17
"""Where bytes cost next to nothing: copying so many takes about as long as sending and receiving a message."""


class Sharding:
    """Cuts the buckets of one generation into shards, one for each owner, or fewer where shards would be small.

    A bucket of ``n`` bytes has ``n / min_bytes`` owners at most. They are those that have got least so far of what is
    theirs, so over all buckets each owns its part. All members ask for the same buckets in the same order.

    Args:
        record: the generation; its ``owners`` say which part of all is whose.
    """

    def __init__(self, record: Record) -> None:
        self._owners = record.owners
        self._lacking = [0.0] * len(record.owners)
        """By rank: the elements that a member lacks of its part of the buckets so far; fewer than 0 if it has more."""
        hosts = {member.host for member in record.members}
        self._min_bytes = MIN_SHARD_BYTES_ON_ONE_MACHINE if len(hosts) == 1 and "" not in hosts else MIN_SHARD_BYTES

    def bounds(self, numel: int, num_bytes: int) -> Sequence[Shard | None]:
        """The shards of the next bucket.

        Args:
            numel: its elements.
            num_bytes: of them on the wire.

        Returns:
            By rank; None for one that owns nothing. They tile ``range(numel)`` in rank order.
        """
        total, most = sum(self._owners), max(1, num_bytes // self._min_bytes)
        owners = [rank for rank, part in enumerate(self._owners) if part > 0]
        if numel == 0:
            return [(0, 0) if rank == owners[0] else None for rank in range(len(self._owners))]
        if len(owners) <= most:
            return _shards(numel, self._owners)
        for rank in owners:
            self._lacking[rank] += numel * self._owners[rank] / total
        chosen = sorted(owners, key=lambda rank: (-self._lacking[rank], rank))[:most]
        parts = [max(0.0, self._lacking[rank]) if rank in chosen else 0.0 for rank in range(len(self._owners))]
        shards = _shards(numel, parts)
        for rank, shard in enumerate(shards):
            self._lacking[rank] -= shard[1] - shard[0] if shard is not None else 0
        return shards


def _shards(numel: int, parts: Sequence[float]) -> list[Shard | None]:
    return [(start, stop) if stop > start else None for start, stop in shard_bounds(numel, parts)]
