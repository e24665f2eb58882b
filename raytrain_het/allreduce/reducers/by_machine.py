"""Gradients of workers that share a machine are added up there, and their sum crosses the machine's link once.

1. Every member sends its weighted gradient as it is to its machine's *leader*, which adds up what comes.
2. The leaders all-reduce these sums among themselves, encoded and with error feedback. The other members launch empty
   operations meanwhile, so that all members count the same operations.
3. Each leader sends the means to the other members on its machine, behind the merged header of all.

So of ``m`` workers on a machine one sends over its link, at the price of two more ways through the machine's memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence

import torch

from raytrain_het.allreduce.codecs import Codec, codec_of
from raytrain_het.allreduce.compression_error import CompressionErrorMeter
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Bucket
from raytrain_het.allreduce.reducers.base import BucketReducer, SendBuffer
from raytrain_het.allreduce.reducers.flat import flat_kind, flat_reducer
from raytrain_het.allreduce.reducers.generation_group import GenerationGroup
from raytrain_het.allreduce.reducers.gradient_coder import GradientCoder
from raytrain_het.allreduce.reducers.to_owners import ShardsToOwners
from raytrain_het.allreduce.transport.group import Group, Operation, PeerBuffers
from raytrain_het.membership.record import Record


class Machines:
    """Which members of a generation share a machine, and how their leaders reach each other.

    Args:
        members: the generation's.
        codecs: by rank; those of leaders count.
        feedback: what this member's codec remembers, if it is a leader.
        error_meter: measures now and then what encoding loses.
        num_buckets: of the layout.
    """

    def __init__(
        self,
        members: GenerationGroup,
        codecs: Sequence[Codec],
        feedback: ErrorFeedback,
        error_meter: CompressionErrorMeter,
        num_buckets: int,
    ) -> None:
        self.members, self.feedback, self._codecs = members, feedback, codecs
        rank, self.leader_of = members.rank, members.record.leaders
        self.leader = self.leader_of[rank]
        """The rank of this member's leader."""
        self.leads = self.leader == rank
        self.local_others = [k for k, leader in enumerate(self.leader_of) if leader == rank and k != rank]
        """Of a leader: the ranks of the others on its machine."""
        plain = [codec_of("none")] * members.size
        self.coder = GradientCoder(members, plain, feedback, error_meter, num_buckets)
        """Adds up what travels inside of the machine."""
        self.nothing = PeerBuffers(members.new_buffer(0), [0] * members.size)
        leaders = sorted(set(self.leader_of))
        self._leaders: GradientCoder | None = None
        self.is_idle = False
        """Whether this member leads, but its machine neither sends nor owns anything."""
        if self.leads:
            record, place = _by_machine(members.record, self.leader_of, leaders), leaders.index(rank)
            self.is_idle = record.shares[place] == record.owners[place] == 0
            group: Group = _LeadersGroup(members.group, leaders)
            among = GenerationGroup(record, place, group, members.traffic, num_speakers=members.size)
            chosen = [codecs[k] for k in leaders]
            self._leaders = GradientCoder(among, chosen, feedback, error_meter, num_buckets)

    def reducer_among_leaders(self, bucket: Bucket) -> BucketReducer | None:
        """The bucket's reducer among the leaders; None if this member is none of them."""
        return flat_reducer(self._leaders.members, bucket, self._leaders) if self._leaders is not None else None

    def num_operations_among_leaders(self, bucket: Bucket) -> int:
        """How many operations the leaders' all-reduce takes."""
        return flat_kind(self.coder.dense if bucket.is_dense else self._codecs[self.leader]).num_operations


class ByMachineReducer:
    """See the module's text, and :class:`~raytrain_het.allreduce.reducers.base.BucketReducer`.

    Args:
        machines: the generation's.
        bucket: which one.
    """

    def __init__(self, machines: Machines, bucket: Bucket) -> None:
        self._machines, self._bucket = machines, bucket
        members, leader_of, n = machines.members, machines.leader_of, bucket.numel
        self._inside = ShardsToOwners(
            members,
            dataclasses.replace(bucket, is_dense=True),
            machines.coder,
            [(0, n) if receiver == machines.leader else None for receiver in range(members.size)],
            [(0, n) if leader == members.rank else None for leader in leader_of],
        )
        self._among_leaders = machines.reducer_among_leaders(bucket)
        self._sum = torch.empty(n if machines.leads else 0, dtype=bucket.dtype, device=members.device)
        """Of a leader: its machine's sum."""
        head = members.header_format(bucket).num_bytes
        self._message = members.new_buffer(head + n * bucket.dtype.itemsize)
        """From the leader to its machine."""
        self._mean = self._message[head:].view(bucket.dtype)
        """As all members have it, until the next step's comes."""
        self._format, size = members.header_format(bucket), members.size
        self._of_all = self._format.place(self._message)
        """The merged header of all members."""
        if machines.leads:
            copies = PeerBuffers.copies(self._message, machines.local_others, size)
            self._to_machine, self._from_leader = copies, machines.nothing
        else:
            lengths = [self._message.numel() if k == machines.leader else 0 for k in range(size)]
            self._to_machine, self._from_leader = machines.nothing, PeerBuffers(self._message, lengths)

    @property
    def owned(self) -> tuple[int, int]:
        return self._among_leaders.owned if self._among_leaders is not None else (0, 0)

    @property
    def gradient_bytes(self) -> int:
        """Between machines, if this member is a leader."""
        if self._among_leaders is not None:
            return self._among_leaders.gradient_bytes
        return self._machines.coder.gradient_bytes(self._bucket)

    def send_buffers(self) -> list[SendBuffer] | None:
        return self._inside.send_buffers()

    def expect_step(self) -> None:
        self._inside.expect_step()

    def all_reduce(
        self, header: Header, local: torch.Tensor | None, weight: float
    ) -> Generator[Operation, None, Header]:
        machines, bucket = self._machines, self._bucket
        if machines.is_idle and not bucket.is_dense:
            # Before others know that this gradient is not needed, and commit the step.
            machines.feedback.carry_over(bucket, 0, bucket.numel, header.step)
        yield self._inside.send(header, local, 1.0)
        if self._among_leaders is not None:
            of_machine, payloads = self._inside.received(header)
            machines.coder.add_up(payloads, bucket, self._sum)
            of_all = yield from self._among_leaders.all_reduce(of_machine, self._sum, weight)
            self._format.write(of_all, self._of_all)
            self._among_leaders.decode(self._mean)
        else:
            for _ in range(machines.num_operations_among_leaders(bucket)):
                yield machines.members.launch(machines.nothing, machines.nothing)
        yield machines.members.launch(self._from_leader, self._to_machine)
        of_all = self._format.read(self._of_all)
        machines.members.check_header(of_all, bucket.index, header.step, machines.leader)
        return of_all

    def decode(self, out: torch.Tensor) -> None:
        out.copy_(self._mean)


def _by_machine(record: Record, leader_of: Sequence[int], leaders: Sequence[int]) -> Record:
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


class _LeadersGroup:
    """Some ranks of a group as a :class:`~raytrain_het.allreduce.transport.group.Group`. The other ranks launch empty
    operations for theirs."""

    def __init__(self, group: Group, ranks: Sequence[int]) -> None:
        self.key, self.rank, self.size, self.device = group.key, list(ranks).index(group.rank), len(ranks), group.device
        self.poll_s = group.poll_s
        self._group, self._ranks = group, list(ranks)
        self._in_whole_group: dict[int, tuple[PeerBuffers, PeerBuffers]] = {}
        """By the id of buffers: those, which so stay alive, and the same for the whole group."""

    def all_to_all(self, out: PeerBuffers, inp: PeerBuffers, expected: None = None, *, flush: bool = True) -> Operation:
        """See :class:`raytrain_het.allreduce.transport.group.Group`."""
        return self._group.all_to_all(self._whole(out), self._whole(inp), flush=flush)

    def _whole(self, buffers: PeerBuffers) -> PeerBuffers:
        if id(buffers) not in self._in_whole_group:
            self._in_whole_group[id(buffers)] = buffers, buffers.in_larger_group(self._ranks, self._group.size)
        return self._in_whole_group[id(buffers)][1]

    def join(self, poller: object) -> None:
        """Nothing to do: the whole group has joined."""

    def leave(self) -> None:
        """Nothing to do: the whole group leaves."""

    def expect(self, out: PeerBuffers) -> None:
        """Operations of a part of a group are not expected."""

    def sent(self) -> dict[int, tuple[int, float]]:
        """Nothing: the whole group knows."""
        return {}
