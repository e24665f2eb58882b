"""A generation's all-reduce: which reducer each bucket has, and what all kinds have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch

from raytrain_het.allreduce.codecs import Codec, codec_of
from raytrain_het.allreduce.codecs.lowrank import LowRank
from raytrain_het.allreduce.compression_error import CompressionErrorMeter
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Bucket, Layout
from raytrain_het.allreduce.reducers.base import BucketReducer, SendBuffer
from raytrain_het.allreduce.reducers.by_machine import ByMachineReducer, Machines
from raytrain_het.allreduce.reducers.flat import flat_reducer
from raytrain_het.allreduce.reducers.generation_group import GenerationGroup, Traffic
from raytrain_het.allreduce.reducers.gradient_coder import GradientCoder
from raytrain_het.allreduce.reducers.low_rank import LowRankReducer, MatrixFactors
from raytrain_het.allreduce.step_summary import SummarySoFar
from raytrain_het.allreduce.transport.group import Group, Operation
from raytrain_het.membership.record import Record


class Reducer:
    """The weighted all-reduce of one generation, ``g = sum_i w_i g_i / sum_i w_i``, exact for whoever took part.

    Each bucket has a :class:`~raytrain_het.allreduce.reducers.base.BucketReducer`, whose order and threads hold here.

    Args:
        members: the generation's.
        codecs: by rank.
        layout: the buckets.
        feedback: what this member's codec remembers, from earlier generations too.
        by_bucket: the buckets' reducers, in the layout's order.
        own_codec: the one in which this member encodes.
    """

    def __init__(
        self,
        members: GenerationGroup,
        codecs: tuple[Codec, ...],
        layout: Layout,
        feedback: ErrorFeedback,
        by_bucket: Sequence[BucketReducer],
        own_codec: Codec,
    ) -> None:
        self.record, self.rank, self.group, self.traffic = members.record, members.rank, members.group, members.traffic
        self.codecs, self.layout, self.feedback, self.by_bucket = codecs, layout, feedback, by_bucket
        self._members, self._codec = members, own_codec
        feedback.use_codec(own_codec, members.device)

    @cached_property
    def send_buffers(self) -> list[list[SendBuffer] | None]:
        """By bucket: where local gradients can be gathered so that nothing is left to encode; None if they must be
        encoded. A bucket that is filled there has no ``local`` in :meth:`all_reduce`."""
        return [reducer.send_buffers() for reducer in self.by_bucket]

    @cached_property
    def gradient_bytes(self) -> int:
        """Bytes of this member's whole gradient on the wire, sent once."""
        return sum(reducer.gradient_bytes for reducer in self.by_bucket)

    def expect_step(self) -> None:
        """A step is opened, perhaps again. What peers send for it is received from now on."""
        self.feedback.use_codec(self._codec, self.group.device)
        self.feedback.begin_step()
        for reducer in self.by_bucket:
            reducer.expect_step()

    def all_reduce(
        self,
        bucket: Bucket,
        header: Header,
        local: torch.Tensor | None,
        out: torch.Tensor,
        summary: SummarySoFar,
        *,
        expected_weight: float = 1.0,
    ) -> Iterator[Operation]:
        """Reduce a bucket from local gradients to their mean, by operations with the peers.

        Each operation that is yielded has been launched, and must be over before the next one is asked for. All members
        ask in the same order.

        Args:
            bucket: which one.
            header: what this member says of its gradient.
            local: the weighted gradient (n,), which may be changed; None where it was gathered in
                :attr:`send_buffers`, or this member sends nothing.
            out: where the mean goes (n,).
            summary: where is noted what all members say of the bucket.
            expected_weight: the sum of all members' weights, as far as it is known.

        Raises:
            ProtocolError: a peer is at another step or bucket, or a payload does not decode.
        """
        reducer, normalised = self.by_bucket[bucket.index], self.record.normalised
        weight = expected_weight if normalised else 1.0
        self.feedback.begin_bucket(bucket, reducer.owned, weight if normalised else None)
        if local is not None and header.contributes:
            self.feedback.add_earlier_residual(bucket, local, weight)
        of_all = yield from reducer.all_reduce(header, local, weight)
        summary.note(of_all, self.record.members)
        reducer.decode(out)

    def decode(self, bucket: Bucket, out: torch.Tensor) -> None:
        """Write the mean once more into ``out`` (n,), while the step is kept."""
        self.by_bucket[bucket.index].decode(out)

    def check_header(self, header: Header, bucket: int, step: int, sender: int) -> None:
        """Raises ProtocolError where a peer is at another step or bucket than this member."""
        self._members.check_header(header, bucket, step, sender)


def reducer_for(
    record: Record,
    rank: int,
    layout: Layout,
    group: Group,
    feedback: ErrorFeedback,
    error_meter: CompressionErrorMeter | None = None,
    epoch: int | None = None,
) -> Reducer:
    """The reducer of a generation, as its record says.

    ==================================  ================================================
    the record                          each bucket
    ==================================  ================================================
    ``lowrank``                         low rank, whose factors go one of the ways below
    several workers on some machine     by machine, where that is wanted
    a codec with ``all_gather``         all-gather; dense buckets by owner shards
    any other codecs                    owner shards
    ==================================  ================================================

    Args:
        record: the generation.
        rank: this member's rank in it.
        layout: the buckets.
        group: the process group of the record's members.
        feedback: what this member's codec remembers, from earlier generations too.
        error_meter: measures now and then what encoding loses.
        epoch: that it is for, where codecs warm up; left out, the generation's first one.
    """
    members, error_meter = GenerationGroup(record, rank, group), error_meter or CompressionErrorMeter()
    codecs = codecs_at(record, record.cursor.epoch if epoch is None else epoch)
    coder = GradientCoder(members, codecs, feedback, error_meter, len(layout.buckets))
    machines = Machines(members, codecs, feedback, error_meter, len(layout.buckets)) if record.is_hierarchical else None

    def plain(bucket: Bucket) -> BucketReducer:
        return ByMachineReducer(machines, bucket) if machines is not None else flat_reducer(members, bucket, coder)

    codec = codecs[rank]
    if isinstance(codec, LowRank):
        assert len(set(record.codecs)) == 1, f"codecs {record.codecs}: low rank is used by all members or by none"
    by_bucket: list[BucketReducer] = []
    second = len(layout.buckets)
    for bucket in layout.buckets:
        if isinstance(codec, LowRank) and not bucket.is_dense:
            factors = MatrixFactors(bucket, codec, second=second, seed=record.number, device=members.device)
            second += factors.second is not None
            by_bucket.append(LowRankReducer(bucket, factors, plain, coder))
        else:
            by_bucket.append(plain(bucket))
    # A member that sends its gradients as they are to its machine's leader leaves nothing out.
    encodes = machines is None or machines.leads or isinstance(codec, LowRank)
    return Reducer(members, codecs, layout, feedback, by_bucket, codec if encodes else codec_of("none"))


def codecs_at(record: Record, epoch: int) -> tuple[Codec, ...]:
    """The members' codecs in an epoch, by rank."""
    return tuple(codec_of(word).at_epoch(epoch) for word in record.codecs)


class ReducerByEpoch:
    """A generation's reducer, epoch by epoch: where codecs warm up, messages have other sizes in the next epoch.

    Args:
        record: the generation.
        make: makes the reducer for an epoch.
    """

    def __init__(self, record: Record, make: Callable[[int], Reducer]) -> None:
        self.record = record
        self._make = make
        self.current = make(record.cursor.epoch)
        """The reducer of the last step."""

    @property
    def traffic(self) -> Traffic:
        """Bytes of the generation's messages since they were last taken."""
        return self.current.traffic

    def is_unchanged_in(self, epoch: int) -> bool:
        """Whether messages have the same sizes in this epoch as in the last step."""
        return codecs_at(self.record, epoch) == self.current.codecs

    def open(self, epoch: int) -> Reducer:
        """The reducer for a step of this epoch, which begins."""
        if not self.is_unchanged_in(epoch):
            following = self._make(epoch)
            following.traffic.take(self.current.traffic)
            self.current = following
        return self.current
