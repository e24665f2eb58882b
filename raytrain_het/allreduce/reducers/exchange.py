"""The weighted all-reduce of one step: ``g = sum_i w_i g_i / sum_i w_i``, exact for whoever took part.

Every bucket's shards go to their owners, who add them up and send the means to all (``owner_shards``): so replicas are
identical to the bit whatever the codec, and a gradient is quantised twice, whatever the number of members. A codec that
all members use together, ``lowrank``, has two buckets of factors go that way, one after the other (``low_rank``). Where
workers share a machine, their gradients may be added up there first (``by_machine``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch

from raytrain_het.allreduce.codec_states import CodecStates
from raytrain_het.allreduce.codecs import RESIDUAL, Codec, codec_of
from raytrain_het.allreduce.fidelity import Fidelity
from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Bucket, Layout
from raytrain_het.allreduce.reducers.by_machine import Hierarchy
from raytrain_het.allreduce.reducers.low_rank import Factors, factors_of
from raytrain_het.allreduce.reducers.owner_shards import Messages, Traffic, Wire
from raytrain_het.allreduce.sums import Sums
from raytrain_het.allreduce.transport.group import Group, Operation
from raytrain_het.membership.record import Record


def codecs_at(record: Record, epoch: int) -> tuple[Codec, ...]:
    """By rank."""
    return tuple(codec_of(word).at_epoch(epoch) for word in record.codecs)


class Exchange:
    """One generation's all-reduce.

    Args:
        record: the generation.
        rank: this member's rank in it.
        layout: the buckets.
        group: the process group.
        states: what this member's codec remembers, from earlier generations too.
        fidelity: looks now and then at what encoding loses.
        epoch: that it is for, where codecs warm up; the generation's first one.
    """

    def __init__(
        self,
        record: Record,
        rank: int,
        layout: Layout,
        group: Group,
        states: CodecStates,
        fidelity: Fidelity | None = None,
        epoch: int | None = None,
    ) -> None:
        self.record, self.rank, self.layout, self.group, self.states = record, rank, layout, group, states
        self._fidelity = fidelity or Fidelity()
        self.codecs = codecs_at(record, record.cursor.epoch if epoch is None else epoch)
        self._factors = factors_of(record, self.codecs[0], layout, group.device)
        hierarchical = record.is_hierarchical
        # Who only passes its gradients on to its machine's leader leaves nothing out.
        passes_on = hierarchical and record.leaders[rank] != rank and not self._factors
        self._codec = codec_of("none") if passes_on else self.codecs[rank]
        states.use(self._codec, group.device)
        travelling = [self._factors[b.index].first if b.index in self._factors else b for b in layout.buckets]
        travelling += [f.second for f in self._factors.values() if f.second is not None]
        kind = Hierarchy if hierarchical else Messages
        self.messages: Messages | Hierarchy = kind(record, rank, self.codecs, travelling, group, states, self._fidelity)

    @cached_property
    def wires(self) -> list[list[Wire] | None]:
        """By bucket: where local gradients can be gathered so that nothing is left to encode; None where that cannot
        be.

        Whoever fills a bucket there passes no ``local`` to :meth:`all_reduce`.
        """
        return [None if b.index in self._factors else self.messages.wires_of(b) for b in self.layout.buckets]

    @property
    def traffic(self) -> Traffic:
        """Of this generation's messages."""
        return self.messages.traffic

    def expect(self) -> None:
        """A step is opened: what others send is taken from now on, whenever this member is ready itself."""
        self.states.use(self._codec, self.group.device)
        self.states.begin()
        self.messages.expect()

    def all_reduce(
        self,
        bucket: Bucket,
        header: Header,
        local: torch.Tensor | None,
        out: torch.Tensor,
        sums: Sums,
        *,
        expected_weight: float = 1.0,
    ) -> Iterator[Operation]:
        """A bucket's way from local gradients to their mean, by operations with the peers.

        Each that it yields has been launched, and must be over before the next one is asked for. All members ask in
        the same order.

        Args:
            bucket: which one.
            header: what everybody is told.
            local: the weighted gradient (n,), which may be changed; None where it was gathered in :attr:`wires`, or
                this member sends nothing.
            out: where the mean goes (n,).
            sums: where what the headers say is noted.
            expected_weight: the sum of all members' weights, as far as it is known.
        """
        normalised, factors = self.record.normalised, self._factors.get(bucket.index)
        weight = expected_weight if normalised else 1.0
        owned = self.messages.owned(bucket) if factors is None else (0, 0)
        self.states.encodes(bucket, owned, weight if normalised else None)
        if factors is not None:
            yield from self._reduce_factors(bucket, factors, header, local, sums, weight)
        else:
            if local is not None and header.contributes:
                self.states.flush(bucket, local, weight)
            yield self.messages.scatter(bucket, header, local, weight)
            yield from self.messages.reduce(bucket, sums)
        self.decode(bucket, out)

    def decode(self, bucket: Bucket, out: torch.Tensor) -> None:
        """The mean once more (n,), while the step is kept."""
        factors = self._factors.get(bucket.index)
        if factors is not None:
            factors.multiply(out)
        else:
            self.messages.decode(bucket, out)

    def _reduce_factors(
        self, bucket: Bucket, factors: Factors, header: Header, local: torch.Tensor | None, sums: Sums, weight: float
    ) -> Iterator[Operation]:
        messages, second, y = self.messages, factors.second, None
        if local is not None and header.contributes:
            kept, following = self.states.of_shard(bucket, 0, bucket.numel, header.step)
            local = local.to(self.group.device)
            y = torch.add(local, kept[RESIDUAL], alpha=weight, out=following[RESIDUAL])
        else:
            self.states.carry(bucket, 0, bucket.numel, header.step)
        there = messages.scatter(factors.first, header, factors.project(y) if y is not None else None, weight)
        if second is None:  # All has been sent: others may commit the step, and this one may take it over.
            self._leave(bucket, factors, y, header.step, weight)
        yield there
        yield from messages.reduce(factors.first, sums)
        messages.decode(factors.first, factors.p)
        if second is None:
            return
        factors.orthonormalise()
        again = header._replace(bucket=second.index, used=0)
        back = messages.scatter(second, again, factors.project_back(y) if y is not None else None, weight)
        self._leave(bucket, factors, y, header.step, weight)  # While that is on its way.
        yield back
        yield from messages.reduce(second, sums, first=False)
        messages.decode(second, factors.q)

    def _leave(self, bucket: Bucket, factors: Factors, y: torch.Tensor | None, step: int, weight: float) -> None:
        """What the factors lack is kept."""
        if y is None:
            return
        due = factors.is_warm and self._fidelity.is_due(step, bucket.index, len(self.layout.buckets))
        norm = float(torch.linalg.vector_norm(y)) if due else 0.0
        factors.leave(y, weight)
        if norm > 0:
            error = weight * float(torch.linalg.vector_norm(y)) / norm
            self._fidelity.note(step, self.record.codecs[self.rank], error)


class Exchanges:
    """One generation's, epoch by epoch: where codecs warm up, messages have other sizes then.

    Args:
        record: the generation.
        make: one for an epoch.
    """

    def __init__(self, record: Record, make: Callable[[int], Exchange]) -> None:
        self.record = record
        self._make = make
        self.current = make(record.cursor.epoch)
        """That of the last step."""

    def are_the_same_in(self, epoch: int) -> bool:
        """Whether messages have the same sizes in this epoch as in the last step."""
        return codecs_at(self.record, epoch) == self.current.codecs

    def open(self, epoch: int) -> Exchange:
        """A step of this epoch begins."""
        if not self.are_the_same_in(epoch):
            following = self._make(epoch)
            following.traffic.take(self.current.traffic)
            self.current = following
        return self.current
