"""What the members of one generation do together: the all-reduce of a step, its confirmation, a resynchronisation."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from raytrain_het.allreduce import points
from raytrain_het.allreduce.header import Header, header_bytes, read_header, write_header
from raytrain_het.allreduce.jobs import ConfirmJob, ResyncJob, StepJob
from raytrain_het.allreduce.layout import Bucket, Layout
from raytrain_het.allreduce.patience import Patience
from raytrain_het.allreduce.reducers.exchange import Exchange, Exchanges
from raytrain_het.allreduce.sums import Sums
from raytrain_het.allreduce.transport.group import Operation, Parts
from raytrain_het.allreduce.transport.one_to_all import one_to_all
from raytrain_het.membership.agent import MemberAgent

_UnderWay = tuple[Iterator[Operation], Operation]
"""What is left to do of a bucket, and what it waits for."""

_CONFIRM = Bucket(0xFFFF, torch.uint8, ())


class Rounds:
    """One generation's, on the communication thread. A fault ends any of them.

    Raises:
        Interrupted: (each of its methods) the generation is void.
        GroupError: (each of its methods) the connection to a peer has failed.
        ProtocolError: (each of its methods) a peer is at another step.
    """

    def __init__(self, exchanges: Exchanges, layout: Layout, agent: MemberAgent, patience: Patience) -> None:
        self.exchanges = exchanges
        self._layout, self._agent, self._patience = layout, agent, patience

    @property
    def exchange(self) -> Exchange:
        """That of the last step."""
        return self.exchanges.current

    def step(self, job: StepJob) -> Sums:
        """Each bucket's next operation is launched after the one of the bucket behind it: one order on all members."""
        exchange, buckets = self.exchanges.open(job.epoch), self._layout.buckets
        sums = Sums(step=job.step)
        under_way: list[_UnderWay] = []
        exchange.expect()
        expected = exchange.states.expected_weight(job.num_samples)
        k = 0
        while k < len(buckets) or under_way:
            before, under_way = under_way, []
            if k < len(buckets):
                self._patience.until(functools.partial(_is_ready, job, k), job.generation, job.step, peers=False)
                self._patience.position = job.step * 1000 + k
                local = job.locals[k] if job.locals is not None else None
                operations = exchange.all_reduce(
                    buckets[k], self._header(job, buckets[k]), local, job.outs[k], sums, expected_weight=expected
                )
                under_way.append((operations, next(operations)))
            if k == 1:
                points.reach("between_buckets", job.step)
            for operations, operation in before:
                self._patience.finish_of_step(operation, job, len(buckets))
                following = next(operations, None)
                if following is not None:
                    under_way.append((operations, following))
            k += 1
        exchange.states.saw_weight(sums.total_weight, job.num_samples)
        return sums

    def _header(self, job: StepJob, bucket: Bucket) -> Header:
        k = bucket.index
        return Header(
            step=job.step,
            generation=job.generation,
            bucket=k,
            want=max(self._agent.want, job.generation),
            weight=job.weight,
            finite=job.finite[k] if job.finite else True,
            contributes=job.contributes,
            digest=job.digest,
            numbers=job.numbers,
            loss=job.loss,
            used=job.used[k] if job.used else 0,
        )

    def confirm(self, job: ConfirmJob) -> None:
        """A round of headers only."""
        exchange = self.exchange
        size, length = exchange.group.size, header_bytes(0)
        message = torch.zeros(size * length, dtype=torch.uint8, device=exchange.group.device)
        out = torch.zeros_like(message)
        header = Header(
            step=job.step,
            generation=job.generation,
            bucket=_CONFIRM.index,
            want=max(self._agent.want, job.generation),
            weight=0.0,
            finite=True,
            contributes=False,
            digest=0,
            numbers=0,
            used=0,
        )
        for rank in range(size):
            write_header(header, 0, message[rank * length : (rank + 1) * length])
        self._patience.position = job.step * 1000 + 999
        lengths = [length] * size
        operation = exchange.group.all_to_all(Parts(out, lengths), Parts(message, lengths))
        self._patience.finish(operation, job.generation, job.step)
        exchange.traffic.sent += (size - 1) * length
        exchange.traffic.received += (size - 1) * length
        for rank in range(size):
            theirs = read_header(out[rank * length :], 0)
            exchange.messages.check(theirs, _CONFIRM, job.step, rank)
            job.want = max(job.want, theirs.want)

    def resync(self, job: ResyncJob, num_bytes: int) -> None:
        """The parameters of the first member that is healed go to all others that are."""
        exchange, record = self.exchange, self.exchange.record
        healed = [rank for rank, m in enumerate(record.members) if m.uid not in record.unhealed]
        source, receivers = healed[0], healed[1:]
        data = job.data if job.data is not None else torch.zeros(num_bytes, dtype=torch.uint8)
        one_to_all(
            exchange.group, source, receivers, data, lambda op: self._patience.finish(op, job.generation, job.step)
        )
        if exchange.rank == source:
            exchange.traffic.sent += data.numel() * len(receivers)
        elif exchange.rank in receivers:
            exchange.traffic.received += data.numel()


def _is_ready(job: StepJob, bucket: int) -> bool:
    return job.ready > bucket
