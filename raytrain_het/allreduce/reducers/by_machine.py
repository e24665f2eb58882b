"""Gradients of workers that share a machine are added up there, and travel on as one.

1. Every member sends its header to all, and its weighted gradient as it is to its machine's *leader*, which adds up
   what comes;
2. the leaders all-reduce these sums among themselves, as members do without a hierarchy: encoded, with error feedback;
3. each leader sends the means to the others on its machine.

So of ``m`` workers on a machine one crosses its link, for two more ways through its memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from raytrain_het.allreduce.codec_states import CodecStates
from raytrain_het.allreduce.codecs import Codec, codec_of
from raytrain_het.allreduce.fidelity import Fidelity
from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Bucket
from raytrain_het.allreduce.reducers.owner_shards import Messages, Traffic, Wire
from raytrain_het.allreduce.sums import Sums
from raytrain_het.allreduce.transport.group import Group, Operation, Parts
from raytrain_het.membership.record import Record


class Hierarchy:
    """One generation's messages, with the methods of :class:`~raytrain_het.allreduce.reducers.owner_shards.Messages`.

    Args:
        record: the generation.
        rank: this member's rank in it.
        codecs: by rank; those of leaders count.
        buckets: all that travel, by index.
        group: the process group, of all members.
        states: what this member's codec remembers, if it is a leader.
        fidelity: looks now and then at what encoding loses.
    """

    def __init__(
        self,
        record: Record,
        rank: int,
        codecs: Sequence[Codec],
        buckets: Sequence[Bucket],
        group: Group,
        states: CodecStates,
        fidelity: Fidelity,
    ) -> None:
        self._group, self._codecs, self._rank = group, codecs, rank
        leader_of = record.leaders
        self.leader = leader_of[rank]
        self._leads = self.leader == rank
        self._under_way: dict[int, tuple[Header, float]] = {}
        self._as_they_are = [dataclasses.replace(bucket, is_dense=True) for bucket in buckets]
        dense = [codec_of("none")] * len(record.members)
        self._inside = Messages(record, rank, dense, self._as_they_are, group, states, fidelity, leader_of)
        self._across: Messages | None = None
        self._states, self._idle = states, False
        if self._leads:
            leaders = sorted(set(leader_of))
            subgroup: Group = _SubGroup(group, leaders)
            machines, place = _of_machines(record, leader_of, leaders), leaders.index(rank)
            self._idle = machines.shares[place] == machines.owners[place] == 0
            self._across = Messages(machines, place, [codecs[k] for k in leaders], buckets, subgroup, states, fidelity)
        local = [k for k, leader in enumerate(leader_of) if leader == rank and k != rank]
        size = len(record.members)
        self._none = Parts(torch.empty(0, dtype=torch.uint8, device=group.device), [0] * size)
        self._means = [torch.empty(bucket.numel, dtype=bucket.dtype, device=group.device) for bucket in buckets]
        """As all have them: good until the next step's come."""
        raw = [mean.view(torch.uint8) for mean in self._means]
        self._passed_on = [Parts.copies(r, local, size) if self._leads else self._none for r in raw]
        self._passed_here = [
            self._none if self._leads else Parts(r, [r.numel() * (k == self.leader) for k in range(size)]) for r in raw
        ]

    @property
    def traffic(self) -> Traffic:
        """Of this generation's messages."""
        traffic = self._inside.traffic
        if self._across is not None:
            traffic.take(self._across.traffic)
        return traffic

    @property
    def gradient_bytes(self) -> int:
        """Of this member's whole gradient on the wire: between machines, if it is a leader."""
        return (self._across or self._inside).gradient_bytes

    def owned(self, bucket: Bucket) -> tuple[int, int]:
        """(start, stop) of the elements whose mean this member encodes."""
        return self._across.owned(bucket) if self._across is not None else (0, 0)

    def wires_of(self, bucket: Bucket) -> list[Wire] | None:
        """Where a local gradient can be gathered so that nothing is left to encode."""
        return self._inside.wires_of(self._as_they_are[bucket.index])

    def expect(self) -> None:
        """A step is opened: what others send is taken from now on, whenever this member is ready itself."""
        self._inside.expect()

    def check(self, header: Header, bucket: Bucket, step: int, sender: int) -> None:
        """See :meth:`Messages.check`."""
        self._inside.check(header, bucket, step, sender)

    def scatter(self, bucket: Bucket, header: Header, local: torch.Tensor | None, weight: float) -> Operation:
        """The header to all, and the gradient to the leader."""
        self._under_way[bucket.index] = header, weight
        if self._idle and not bucket.is_dense:
            # As all do whose gradients nobody needs: before others know that, and commit the step.
            self._states.carry(bucket, 0, bucket.numel, header.step)
        return self._inside.scatter(self._as_they_are[bucket.index], header, local, 1.0)

    def reduce(self, bucket: Bucket, sums: Sums, *, first: bool = True) -> Iterator[Operation]:
        """The leaders' all-reduce, and the means for all."""
        inside = self._as_they_are[bucket.index]
        (total, contributes), across = self._inside.collect(inside, sums, first=first), self._across
        header, weight = self._under_way.pop(bucket.index)
        if across is not None:
            yield across.scatter(bucket, header._replace(contributes=contributes, used=0), total, weight)
            yield from across.reduce(bucket, sums, first=False)
            across.decode(bucket, self._means[bucket.index])
        else:
            all_gather = self._codecs[self.leader].all_gather and not bucket.is_dense
            for _ in range(1 if all_gather else 2):
                yield self._group.all_to_all(self._none, self._none, flush=False)
        here, on = self._passed_here[bucket.index], self._passed_on[bucket.index]
        self._inside.traffic.sent += sum(on.lengths)
        self._inside.traffic.received += sum(here.lengths)
        yield self._group.all_to_all(here, on, flush=False)

    def decode(self, bucket: Bucket, out: torch.Tensor) -> None:
        """The means into ``out`` (n,). May be called again while the step is kept."""
        out.copy_(self._means[bucket.index])


def _of_machines(record: Record, leader_of: Sequence[int], leaders: Sequence[int]) -> Record:
    """The record with one member for each machine."""

    def total(values: Sequence[float], leader: int) -> float:
        return sum(value for value, of in zip(values, leader_of, strict=True) if of == leader)

    return dataclasses.replace(
        record,
        members=tuple(record.members[k] for k in leaders),
        codecs=tuple(record.codecs[k] for k in leaders),
        shares=tuple(total(record.shares, k) for k in leaders),
        owners=tuple(total(record.owners, k) for k in leaders),
    )


class _SubGroup:
    """Some ranks of a group. The others launch empty operations meanwhile, so that all count alike."""

    def __init__(self, group: Group, ranks: Sequence[int]) -> None:
        self.key, self.rank, self.size, self.device = group.key, list(ranks).index(group.rank), len(ranks), group.device
        self.poll_s = group.poll_s
        self._group, self._ranks = group, list(ranks)
        self._spread: dict[int, tuple[Parts, Parts]] = {}

    def all_to_all(self, out: Parts, inp: Parts, expected: None = None, *, flush: bool = True) -> Operation:
        """See :class:`raytrain_het.allreduce.transport.group.Group`."""
        return self._group.all_to_all(self._whole(out), self._whole(inp), flush=flush)

    def _whole(self, parts: Parts) -> Parts:
        if id(parts) not in self._spread:
            self._spread[id(parts)] = parts, parts.spread(self._ranks, self._group.size)
        return self._spread[id(parts)][1]

    def join(self, poller: object) -> None:
        """The group has."""

    def leave(self) -> None:
        """The group does."""

    def expect(self, out: Parts) -> None:
        """Operations of a part are not expected."""

    def sent(self) -> dict[int, tuple[int, float]]:
        """The group knows."""
        return {}
