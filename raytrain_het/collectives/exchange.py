"""The weighted all-reduce of one step: ``g = sum_i w_i g_i / sum_i w_i``, exact for whoever took part.

For every bucket, two uneven all-to-alls of bytes:

1. *scatter*: rank ``i`` encodes each owner's shard of its weighted gradient ``w_i g_i`` and sends it there, behind a header
   that goes to every member (also those that own nothing);
2. each owner decodes all payloads, adds them up in rank order in fp32 (fp64 for fp64), divides by the sum of weights, and
   encodes the result once; *gather*: it sends that to all, and everyone, itself included, decodes the same bytes.

So replicas are identical to the bit whatever the codec, and a gradient is quantised twice, whatever the number of members.
Sizes of all messages are pure functions of (record, bucket): gloo aborts a process that gets more bytes than it expects.

Shapes: ``N`` members, ``n`` elements of a bucket, ``n_j`` those of owner ``j``'s shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from raytrain_het.collectives.group import Group, Operation
from raytrain_het.collectives.header import Header, header_bytes, read_header, write_header
from raytrain_het.collectives.layout import Bucket, Layout, aligned, shard_bounds
from raytrain_het.compression import CODECS
from raytrain_het.errors import ProtocolError
from raytrain_het.membership.record import Record


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
    digests: dict[int, int] = field(default_factory=dict)
    """By rank, if a comparison of replicas was due."""

    @property
    def applies(self) -> bool:
        """Whether there is an update to apply."""
        return self.finite and self.total_weight > 0


@dataclass
class Traffic:
    """Bytes that crossed to and from other members, headers included."""

    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class _Plan:
    """Sizes and places of one bucket's messages for this rank."""

    header: int
    bounds: list[tuple[int, int]]
    scatter_in: list[int]
    scatter_out: list[int]
    gather_in: list[int]
    gather_out: list[int]


class Exchange:
    """One generation's all-reduce: its plan, and wire buffers of its own.

    Args:
        record: the generation.
        rank: this member's rank in it.
        layout: the buckets.
        group: the process group.
    """

    def __init__(self, record: Record, rank: int, layout: Layout, group: Group) -> None:
        self.record, self.rank, self.layout, self.group = record, rank, layout, group
        self.traffic = Traffic()
        size = len(record.members)
        self._sends = [share > 0 for share in record.shares]
        self._codecs = [CODECS[name] for name in record.codecs]
        self._dense = CODECS["none"]
        self._plans = [self._plan(bucket, size) for bucket in layout.buckets]
        self._scatter_in = [torch.zeros(sum(p.scatter_in), dtype=torch.uint8) for p in self._plans]
        self._scatter_out = [torch.zeros(sum(p.scatter_out), dtype=torch.uint8) for p in self._plans]
        self._gather_in = [torch.zeros(sum(p.gather_in), dtype=torch.uint8) for p in self._plans]
        self.gathered = [torch.zeros(sum(p.gather_out), dtype=torch.uint8) for p in self._plans]
        """What the owners sent: the kept sums of the last step, until the next step's headers confirm it."""
        self._sum = [
            torch.zeros(stop - start, dtype=bucket.dtype)
            for bucket, plan in zip(layout.buckets, self._plans, strict=True)
            for start, stop in (plan.bounds[rank],)
        ]
        most = max((s.numel() for s in self._sum), default=0)
        self._scratch = {dtype: torch.zeros(most, dtype=dtype) for dtype in {b.dtype for b in layout.buckets}}

    def _codec(self, rank: int, bucket: Bucket):
        return self._dense if bucket.is_state else self._codecs[rank]

    def _plan(self, bucket: Bucket, size: int) -> _Plan:
        bounds = shard_bounds(bucket.numel, self.record.owners)
        header = header_bytes(len(bucket.segments))

        def payload(sender: int, owner: int) -> int:
            start, stop = bounds[owner]
            return aligned(self._codec(sender, bucket).capacity_bytes(stop - start, bucket.dtype)) if stop > start else 0

        me = self.rank
        return _Plan(
            header=header,
            bounds=bounds,
            scatter_in=[header + (payload(me, j) if self._sends[me] else 0) for j in range(size)],
            scatter_out=[header + (payload(i, me) if self._sends[i] else 0) for i in range(size)],
            gather_in=[payload(me, me)] * size,
            gather_out=[payload(j, j) for j in range(size)],
        )

    # ---------------------------------------------------------------- the two halves

    def scatter(self, bucket: Bucket, header: Header, local: torch.Tensor | None) -> Operation:
        """Send the header to all and, unless this member sends nothing, each owner its shard of ``local`` (n,)."""
        plan, message = self._plans[bucket.index], self._scatter_in[bucket.index]
        codec = self._codec(self.rank, bucket)
        place = 0
        for owner, length in enumerate(plan.scatter_in):
            if place == 0:
                write_header(header, len(bucket.segments), message[: plan.header])
            else:
                message[place : place + plan.header] = message[: plan.header]
            start, stop = plan.bounds[owner]
            if length > plan.header and local is not None:
                capacity = codec.capacity_bytes(stop - start, bucket.dtype)
                body = message[place + plan.header :][:capacity]
                codec.encode(local[start:stop], body, {}, {})
            place += length
        return self._launch(self._scatter_out[bucket.index], message, plan.scatter_out, plan.scatter_in)

    def reduce(self, bucket: Bucket, sums: Sums) -> Operation:
        """Read all headers, add up the owned shard, and send it to all."""
        plan, message = self._plans[bucket.index], self._scatter_out[bucket.index]
        headers, bodies, place = [], [], 0
        for sender, length in enumerate(plan.scatter_out):
            header = read_header(message[place : place + plan.header], len(bucket.segments))
            self._check(header, bucket, sums.step, sender)
            headers.append(header)
            bodies.append(message[place + plan.header : place + length])
            place += length
        self._note(headers, bucket, sums)
        start, stop = plan.bounds[self.rank]
        out = self._gather_in[bucket.index]
        if stop > start:
            total = self._sum[bucket.index]
            self._add_up(headers, bodies, bucket, total)
            if sums.total_weight > 0:
                total.div_(sums.total_weight)
            codec = self._codec(self.rank, bucket)
            capacity = codec.capacity_bytes(stop - start, bucket.dtype)
            codec.encode(total, out[:capacity], {}, {})
            chunk = plan.gather_in[0]
            for copy in range(1, len(plan.gather_in)):
                out[copy * chunk : (copy + 1) * chunk] = out[:chunk]
        return self._launch(self.gathered[bucket.index], out, plan.gather_out, plan.gather_in)

    def decode(self, bucket: Bucket, out: torch.Tensor) -> None:
        """Decode what the owners sent into ``out`` (n,). May be called again while the step is kept."""
        plan, message, place = self._plans[bucket.index], self.gathered[bucket.index], 0
        for owner, length in enumerate(plan.gather_out):
            start, stop = plan.bounds[owner]
            if stop > start:
                codec = self._codec(owner, bucket)
                capacity = codec.capacity_bytes(stop - start, bucket.dtype)
                codec.decode(message[place : place + capacity], out[start:stop])
            place += length

    # ---------------------------------------------------------------- inside

    def _add_up(self, headers: list[Header], bodies: list[torch.Tensor], bucket: Bucket, total: torch.Tensor) -> None:
        first = True
        for sender, (header, body) in enumerate(zip(headers, bodies, strict=True)):
            if not header.contributes:
                continue
            codec = self._codec(sender, bucket)
            body = body[: codec.capacity_bytes(total.numel(), bucket.dtype)]
            if first:
                codec.decode(body, total)
                first = False
            else:
                part = self._scratch[bucket.dtype][: total.numel()]
                codec.decode(body, part)
                total.add_(part)
        if first:
            total.zero_()

    def _note(self, headers: list[Header], bucket: Bucket, sums: Sums) -> None:
        contributing = [(rank, h) for rank, h in enumerate(headers) if h.contributes]
        if bucket.index == 0:
            sums.total_weight = float(sum(h.weight for _, h in contributing))
            sums.digests = {rank: h.digest for rank, h in enumerate(headers) if h.digest}
        sums.want = max(sums.want, *(h.want for h in headers))
        used = 0
        for rank, header in contributing:
            used |= header.used
            if not header.finite:
                sums.finite = False
                slot = self.record.members[rank].slot
                if slot not in sums.nonfinite_slots:
                    sums.nonfinite_slots.append(slot)
        sums.used.append(used)

    def _check(self, header: Header, bucket: Bucket, step: int, sender: int) -> None:
        if (header.step, header.bucket) != (step, bucket.index):
            slot = self.record.members[sender].slot
            raise ProtocolError(
                f"worker {slot} is at step {header.step}, bucket {header.bucket}, while this one is at step {step}, bucket "
                f"{bucket.index}: the training functions do not take the same steps. Every worker must run the same loop."
            )

    def _launch(self, out: torch.Tensor, inp: torch.Tensor, outs: list[int], ins: list[int]) -> Operation:
        self.traffic.sent += sum(ins) - ins[self.rank]
        self.traffic.received += sum(outs) - outs[self.rank]
        return self.group.all_to_all(out, inp, outs, ins)


def one_to_all(
    group: Group, source: int, receivers: list[int], data: torch.Tensor, launch: Callable[[Operation], None]
) -> None:
    """Send ``data`` (uint8) from one rank to some; on the receivers it is filled, elsewhere only its size matters."""
    none, length = torch.zeros(0, dtype=torch.uint8), data.numel()
    ins, outs = [0] * group.size, [0] * group.size
    if group.rank == source:
        ins = [length if rank in receivers else 0 for rank in range(group.size)]
        launch(group.all_to_all(none, data.repeat(len(receivers)), outs, ins))
    elif group.rank in receivers:
        outs[source] = length
        launch(group.all_to_all(data, none, outs, ins))
    else:
        launch(group.all_to_all(none, none, outs, ins))
