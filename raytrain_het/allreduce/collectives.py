"""What the members of one generation do together: the all-reduce of a step, its confirmation, a resynchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from raytrain_het.allreduce.header import Header, HeaderFormat
from raytrain_het.allreduce.jobs import ConfirmJob, Contribution, LocalBucket, ResyncJob, StepJob
from raytrain_het.allreduce.layout import Bucket, Layout
from raytrain_het.allreduce.reducers import Reducer, ReducerByEpoch
from raytrain_het.allreduce.step_summary import StepSummary, SummarySoFar
from raytrain_het.allreduce.transport.group import Operation, PeerBuffers
from raytrain_het.allreduce.transport.one_to_all import one_to_all
from raytrain_het.allreduce.waiting import Waiter
from raytrain_het.membership.agent import MemberAgent


class _UnderWay(NamedTuple):
    """A bucket on its way."""

    rest: Iterator[Operation]
    """What is left to do of it."""
    operation: Operation
    """What it waits for."""


_CONFIRM = Bucket(0xFFFF, torch.uint8, ())


class Collectives:
    """One generation's, on the communication thread. A fault ends any of them.

    Raises:
        GenerationIsVoid: (each of its methods) the generation is void.
        GroupError: (each of its methods) the connection to a peer has failed.
        ProtocolError: (each of its methods) a peer is at another step.
    """

    def __init__(self, reducers: ReducerByEpoch, layout: Layout, agent: MemberAgent, waiter: Waiter) -> None:
        self.reducers = reducers
        self._layout, self._agent, self._waiter = layout, agent, waiter
        self._num_positions = len(layout.buckets) + 1
        """Of a step: its buckets, and its confirmation."""

    @property
    def reducer(self) -> Reducer:
        """That of the last step."""
        return self.reducers.current

    def all_reduce(self, job: StepJob) -> tuple[StepSummary, float]:
        """The step's buckets, one after the other: each one's next operation is launched after the one of the bucket
        behind it, in one order on all members.

        Returns:
            What the headers say, and the seconds in which only peers were waited for.
        """
        reducer, buckets = self.reducers.open(job.cursor.epoch), self._layout.buckets
        summary, waited_s = SummarySoFar(job.step), 0.0
        under_way: list[_UnderWay] = []
        reducer.expect_step()
        expected_weight = reducer.feedback.expected_weight(job.num_samples)
        k = 0
        while k < len(buckets) or under_way:
            before, under_way = under_way, []
            if k < len(buckets):
                operations = self._begin(job, buckets[k], reducer, summary, expected_weight)
                under_way.append(_UnderWay(operations, next(operations)))
            if k == 1:
                self._agent.points.reach("between_buckets", job.step)
            for bucket in before:
                waited_s += self._waiter.finish_of_step(bucket.operation, job)
                following = next(bucket.rest, None)
                if following is not None:
                    under_way.append(_UnderWay(bucket.rest, following))
            k += 1
        of_all = summary.all()
        reducer.feedback.observe_weight(of_all.total_weight, job.num_samples)
        return of_all, waited_s

    def _begin(
        self, job: StepJob, bucket: Bucket, reducer: Reducer, summary: SummarySoFar, expected_weight: float
    ) -> Iterator[Operation]:
        """Wait until the training thread has filled the bucket, and begin its all-reduce."""
        k = bucket.index
        self._waiter.until(lambda: len(job.buckets) > k, job.generation, job.step, peers=False)
        self._waiter.position = job.step * self._num_positions + k
        mine, local = job.contribution or Contribution(), job.buckets[k]
        header = self._header(job.generation, job.step, k, mine, local)
        return reducer.all_reduce(bucket, header, local.values, mine.means[k], summary, expected_weight=expected_weight)

    def _header(self, generation: int, step: int, bucket: int, mine: Contribution, local: LocalBucket) -> Header:
        return Header(
            step=step,
            generation=generation,
            bucket=bucket,
            want=max(self._agent.want, generation),
            weight=mine.weight,
            contributes=mine.contributes,
            used=local.used,
            nonfinite=0 if local.finite else 1 << self.reducer.rank,
            digest=mine.digest,
            numbers=mine.numbers,
            loss=mine.loss,
        )

    def confirm(self, job: ConfirmJob) -> int:
        """A round of headers only. Returns the highest generation number that any member was told of."""
        reducer = self.reducer
        size, layout = reducer.group.size, HeaderFormat(0, 0)
        length = layout.num_bytes
        message = torch.zeros(size * length, dtype=torch.uint8, device=reducer.group.device)
        out = torch.zeros_like(message)
        header = self._header(job.generation, job.step, _CONFIRM.index, Contribution(), LocalBucket())
        for rank in range(size):
            layout.write(header, message[rank * length : (rank + 1) * length])
        self._waiter.position = (job.step + 1) * self._num_positions - 1
        lengths = [length] * size
        operation = reducer.group.all_to_all(PeerBuffers(out, lengths), PeerBuffers(message, lengths))
        self._waiter.finish(operation, job.generation, job.step)
        reducer.traffic.sent += (size - 1) * length
        reducer.traffic.received += (size - 1) * length
        want = 0
        for rank in range(size):
            theirs = layout.read(out[rank * length :])
            reducer.check_header(theirs, _CONFIRM.index, job.step, rank)
            want = max(want, theirs.want)
        return want

    def resync(self, job: ResyncJob) -> None:
        """The parameters of the first member that is healed go to all others that are."""
        reducer, record = self.reducer, self.reducer.record
        healed = [rank for rank, m in enumerate(record.members) if m.uid not in record.unhealed]
        source, receivers = healed[0], healed[1:]
        data = job.data if job.data is not None else torch.zeros(0, dtype=torch.uint8)
        one_to_all(reducer.group, source, receivers, data, lambda op: self._waiter.finish(op, job.generation, job.step))
        if reducer.rank == source:
            reducer.traffic.sent += data.numel() * len(receivers)
        elif reducer.rank in receivers:
            reducer.traffic.received += data.numel()
