"""Sizes and places of a bucket's messages: a pure function of the record and the codecs, the same on both ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytrain_het.allreduce.codecs import Codec
from raytrain_het.allreduce.header import header_bytes
from raytrain_het.allreduce.layout import Bucket, aligned, shard_bounds
from raytrain_het.membership.record import Record


@dataclass(frozen=True)
class Plan:
    """Of one bucket, for one rank. Sizes in bytes, by rank."""

    header: int
    whole: bool
    """Whether all add up all of it."""
    bounds: list[tuple[int, int]]
    """Of elements: what this member sends to each rank, which adds it up."""
    adds: tuple[int, int]
    """What this member adds up."""
    own: int
    """Bytes of an encoded sum of this rank's shard."""
    scatter_in: list[int]
    scatter_out: list[int]
    gather_out: list[int]


def plan_of(
    bucket: Bucket, record: Record, rank: int, codecs: Sequence[Codec], collectors: Sequence[int] | None
) -> Plan:
    """What goes where.

    Args:
        bucket: which one.
        record: the generation.
        rank: of this member.
        codecs: by rank, of this bucket.
        collectors: by rank, who adds up all that it sends; None where owners do, or all.
    """
    whole, size = codecs[rank].all_gather or collectors is not None, len(record.members)
    shards = shard_bounds(bucket.numel, record.owners) if not whole else []
    header, sends = header_bytes(len(bucket.segments)), [share > 0 for share in record.shares]

    def bounds(sender: int, receiver: int) -> tuple[int, int]:
        if whole:
            return (0, bucket.numel if collectors is None or collectors[sender] == receiver else 0)
        return shards[receiver]

    def payload(sender: int, receiver: int) -> int:
        start, stop = bounds(sender, receiver)
        return aligned(codecs[sender].capacity_bytes(stop - start, bucket.dtype)) if stop > start else 0

    def message(sender: int, receiver: int) -> int:
        return header + (payload(sender, receiver) if sends[sender] and sender != receiver else 0)

    return Plan(
        header=header,
        whole=whole,
        bounds=[bounds(rank, receiver) for receiver in range(size)],
        adds=bounds(rank, rank),
        own=payload(rank, rank) if collectors is None else 0,
        scatter_in=[message(rank, receiver) for receiver in range(size)],
        scatter_out=[message(sender, rank) for sender in range(size)],
        gather_out=[payload(owner, owner) if owner != rank and not whole else 0 for owner in range(size)],
    )
