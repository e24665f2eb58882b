"""A bucket's messages: two uneven all-to-alls of bytes.

1. *scatter*: rank ``i`` encodes each owner's shard of its weighted gradient ``w_i g_i`` and sends it there, behind a
   header that goes to every member (also those that own nothing);
2. each owner decodes all payloads, adds them up in rank order in fp32 (fp64 for fp64), divides by the sum of weights,
   and encodes the result once; *gather*: it sends that to all, and everyone, itself included, decodes the same bytes.

What a member sends to itself stays as and where it is, but for the header: its own part is added up unencoded.

Where a codec has all gather what each sends (*whole* buckets), the first of these goes to all members, the same to
each; there is no second one. All add up the same payloads in the same order, their own among them.

Sizes of all messages are pure functions of (record, bucket): a message of another length is an error.

Shapes: ``N`` members, ``n`` elements of a bucket, ``n_j`` those of owner ``j``'s shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from raytrain_het.allreduce.codec_states import CodecStates
from raytrain_het.allreduce.codecs import RESIDUAL, Codec, Stamp, State, codec_of, mix
from raytrain_het.allreduce.fidelity import Fidelity
from raytrain_het.allreduce.header import Header, HeaderPlace, header_bytes, header_place, read_header, write_header
from raytrain_het.allreduce.layout import Bucket
from raytrain_het.allreduce.reducers.plans import plan_of
from raytrain_het.allreduce.sums import Sums
from raytrain_het.allreduce.transport.group import Group, Operation, Parts
from raytrain_het.errors import ProtocolError
from raytrain_het.membership.record import Record


@dataclass
class Traffic:
    """Bytes that crossed to and from other members, headers included."""

    sent: int = 0
    received: int = 0

    def take(self, other: Traffic) -> None:
        """Add another count to this one, and begin it anew."""
        self.sent, self.received = self.sent + other.sent, self.received + other.received
        other.sent = other.received = 0


_PLAIN = Stamp()

Wire = tuple[int, int, torch.Tensor]
"""Elements ``start`` to ``stop`` of a bucket, and the values (stop - start,) in the message that takes them to their
owner."""


class Messages:
    """One generation's, with buffers of their own.

    Args:
        record: the generation.
        rank: this member's rank in it.
        codecs: by rank.
        buckets: all that travel, by index.
        group: the process group.
        states: what this member's codec remembers, from earlier generations too.
        fidelity: looks now and then at what encoding loses.
        collectors: by rank, who adds up all that it sends, for :meth:`collect`; None where owners do.
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
        collectors: Sequence[int] | None = None,
    ) -> None:
        self.record, self.rank, self.group = record, rank, group
        self._states, self._fidelity = states, fidelity
        self.traffic = Traffic()
        size = len(record.members)
        self._buckets = list(buckets)
        self._sends = [share > 0 for share in record.shares]
        self._codecs = list(codecs)
        self._dense = codec_of("none")
        self._collectors = collectors
        self._plans = [
            plan_of(bucket, record, rank, [self._codec(k, bucket) for k in range(size)], collectors)
            for bucket in self._buckets
        ]
        device = group.device

        def buffer(length: int) -> torch.Tensor:
            # Not zeroed: 20 MB for a million parameters, and peers wait for a new generation.
            return torch.empty(length, dtype=torch.uint8, device=device)

        def parts(lengths: list[int]) -> Parts:
            return Parts(buffer(sum(lengths)), lengths)

        self._scatter_in = [parts(p.scatter_in) for p in self._plans]
        self._scatter_out = [parts(p.scatter_out) for p in self._plans]
        others = [other for other in range(size) if other != rank]
        self._gather_in = [Parts.copies(buffer(p.own), others if not p.whole else [], size) for p in self._plans]
        self._gathered = [parts(p.gather_out) for p in self._plans]
        self._outgoing = [_split(m, len(b.segments)) for b, m in zip(self._buckets, self._scatter_in, strict=True)]
        """By bucket and owner: where the header of what this member sends is, and the payload."""
        self._incoming = [_split(m, len(b.segments)) for b, m in zip(self._buckets, self._scatter_out, strict=True)]
        """By bucket and sender: the same of what it receives."""
        # What the owners sent, this one included (the first copy of what it sends), are the kept sums of the last step,
        # until the next step's headers confirm it.
        self._own: list[torch.Tensor | None] = [None] * len(self._plans)
        """By bucket: this member's payload for its own shard, wherever it is."""
        self._own_wires = self._own.copy()
        self._means = [
            torch.empty(b.numel if p.whole and p.adds[1] else 0, dtype=b.dtype, device=device)
            for b, p in zip(self._buckets, self._plans, strict=True)
        ]
        """Those of whole buckets; where a member collects, sums."""
        self._expected: list[Any] = [None] * len(self._plans)
        most = dict.fromkeys({b.dtype for b in self._buckets}, 0)
        for bucket, plan in zip(self._buckets, self._plans, strict=True):
            start, stop = plan.adds
            most[bucket.dtype] = max(most[bucket.dtype], stop - start)
        self._sum = {dtype: torch.empty(n, dtype=dtype, device=device) for dtype, n in most.items()}
        self._scratch = {dtype: torch.empty(n, dtype=dtype, device=device) for dtype, n in most.items()}

    def owned(self, bucket: Bucket) -> tuple[int, int]:
        """(start, stop) of the elements whose mean this member encodes."""
        plan = self._plans[bucket.index]
        return plan.adds if not plan.whole else (0, 0)

    @cached_property
    def gradient_bytes(self) -> int:
        """Of this member's whole gradient on the wire."""
        return sum(self._codec(self.rank, b).capacity_bytes(b.numel, b.dtype) for b in self._buckets)

    def _codec(self, rank: int, bucket: Bucket) -> Codec:
        return self._dense if bucket.is_dense else self._codecs[rank]

    def wires_of(self, bucket: Bucket) -> list[Wire] | None:
        """Where a local gradient can be gathered so that nothing is left to encode; None where that cannot be."""
        plan, codec = self._plans[bucket.index], self._codec(self.rank, bucket)
        message = self._scatter_in[bucket.index].buffer
        if bucket.is_state or not self._sends[self.rank]:
            return None
        wires, place = [], 0
        for owner, ((start, stop), length) in enumerate(zip(plan.bounds, plan.scatter_in, strict=True)):
            if stop > start:
                capacity = codec.capacity_bytes(stop - start, bucket.dtype)
                mine = owner == self.rank
                body = torch.empty(capacity, dtype=torch.uint8) if mine else message[place + plan.header :][:capacity]
                values = codec.in_place(body, bucket.dtype)
                if values is None:
                    return None
                if mine:
                    self._own_wires[bucket.index] = body
                wires.append((start, stop, values))
            place += length
        return wires

    # ---------------------------------------------------------------- a bucket

    def expect(self) -> None:
        """A step is opened: what others send is taken from now on, whenever this member is ready itself."""
        self._expected = [self.group.expect(out) for out in self._scatter_out]

    def decode(self, bucket: Bucket, out: torch.Tensor) -> None:
        """Decode what the owners sent into ``out`` (n,). May be called again while the step is kept."""
        plan, place = self._plans[bucket.index], 0
        if plan.whole:
            out.copy_(self._means[bucket.index])
            return
        for owner, length in enumerate(plan.gather_out):
            start, stop = plan.bounds[owner]
            if stop > start:
                mine = owner == self.rank
                payload = self._gather_in[bucket.index].buffer if mine else self._gathered[bucket.index].buffer[place:]
                self._decode(owner, payload, bucket, out[start:stop])
            place += length

    # ---------------------------------------------------------------- the two halves

    def scatter(self, bucket: Bucket, header: Header, local: torch.Tensor | None, weight: float) -> Operation:
        """Send the header to all and, unless this member sends nothing, each owner its shard of ``local`` (n,).

        Args:
            bucket: which one.
            header: what everybody is told.
            local: the weighted gradient, which may be changed; None where it was gathered in :meth:`wires_of`.
            weight: that the sum will be divided by, as far as it is known; 1 where it is not.
        """
        if local is None:
            self._own[bucket.index] = self._own_wires[bucket.index]
        outgoing = self._outgoing[bucket.index]
        write_header(header, len(bucket.segments), *(place for place, _ in outgoing))
        whole = self._plans[bucket.index].whole
        if local is not None and self._sends[self.rank]:
            if whole and self._collectors is None:
                self._encode_for_all(bucket, local, [body for _, body in outgoing], header, weight)
            else:
                for owner, (_, body) in enumerate(outgoing):
                    self._encode_shard(bucket, owner, local, body, header, weight)
        if not bucket.is_dense and not (self._sends[self.rank] and header.contributes):
            for owner, (start, stop) in enumerate(self._plans[bucket.index].bounds):
                if (owner == self.rank) == whole and stop > start:
                    self._states.carry(bucket, start, stop, header.step)
        expected, self._expected[bucket.index] = self._expected[bucket.index], None
        # Where owners add up, nobody comes to the next step before they have taken what was sent. Else nothing says so.
        flush = whole and self._collectors is None
        return self._launch(self._scatter_out[bucket.index], self._scatter_in[bucket.index], expected, flush=flush)

    def _encode_shard(
        self, bucket: Bucket, owner: int, local: torch.Tensor, body: torch.Tensor, header: Header, weight: float
    ) -> None:
        start, stop = self._plans[bucket.index].bounds[owner]
        if stop == start:
            return
        shard = local[start:stop]
        if owner == self.rank:
            self._own[bucket.index] = shard.to(self.group.device).view(torch.uint8)
        else:
            self._encode(bucket, start, shard, body, header, weight)

    def _encode_for_all(
        self, bucket: Bucket, local: torch.Tensor, bodies: list[torch.Tensor], header: Header, weight: float
    ) -> None:
        own = self._gather_in[bucket.index].buffer
        self._encode(bucket, 0, local, own, header, weight)
        self._own[bucket.index] = own
        for rank, body in enumerate(bodies):
            if rank != self.rank:
                body.copy_(own)

    def _encode(
        self, bucket: Bucket, start: int, shard: torch.Tensor, body: torch.Tensor, header: Header, weight: float
    ) -> None:
        codec, stop = self._codec(self.rank, bucket), start + shard.numel()
        state: tuple[State, State] = ({}, {})
        if header.contributes and not bucket.is_dense:  # What nobody will use leaves no trace.
            state = self._states.of_shard(bucket, start, stop, header.step)
            if state[0]:
                shard = shard.to(self.group.device)  # Where state and payload are.
        stamp = self._stamp(codec, bucket, header.step, start, weight, stage=0)
        payload = body[: codec.capacity_bytes(stop - start, bucket.dtype)]
        codec.encode(shard, payload, stamp, *state)
        due = self._fidelity.is_due(header.step, bucket.index, len(self._buckets))
        if header.contributes and not bucket.is_dense and due:
            left_out = state[1][RESIDUAL] * weight if RESIDUAL in state[1] else None
            word = self.record.codecs[self.rank]
            self._fidelity.look(header.step, word, codec, payload, shard=shard, left_out=left_out)

    def _stamp(self, codec: Codec, bucket: Bucket, step: int, start: int, weight: float, *, stage: int) -> Stamp:
        if not codec.uses_stamp:
            return _PLAIN
        slot = self.record.members[self.rank].slot
        return Stamp(mix(step, bucket.index, start, slot, stage), mix(step, bucket.index, start), weight)

    def reduce(self, bucket: Bucket, sums: Sums, *, first: bool = True) -> Iterator[Operation]:
        """Read all headers, add up the owned shard, and send it to all, unless all have all of it.

        What headers say is noted in ``sums``, but of a gradient's second bucket.
        """
        self._sum_shard(*self._arrived(bucket, sums, first=first), bucket, sums)
        if not self._plans[bucket.index].whole:
            yield self._launch(self._gathered[bucket.index], self._gather_in[bucket.index])

    def collect(self, bucket: Bucket, sums: Sums, *, first: bool = True) -> tuple[torch.Tensor, bool]:
        """Instead of :meth:`reduce`, with collectors: the sum (n,) of what has come here, nothing (0,) elsewhere; and
        whether anything has."""
        headers, bodies = self._arrived(bucket, sums, first=first)
        total = self._means[bucket.index]
        if total.numel():
            self._add_up(headers, bodies, bucket, total)
        return total, any(h.contributes and body.numel() > 0 for h, body in zip(headers, bodies, strict=True))

    def _arrived(self, bucket: Bucket, sums: Sums, *, first: bool) -> tuple[list[Header], list[torch.Tensor]]:
        """By rank: headers and payloads."""
        headers, bodies = [], []
        for sender, (place, body) in enumerate(self._incoming[bucket.index]):
            header = read_header(place, len(bucket.segments))
            self.check(header, bucket, sums.step, sender)
            headers.append(header)
            bodies.append(body)
        if first:
            sums.note(bucket, headers, self.record.members)
        own = self._own[bucket.index]
        if own is not None:
            bodies[self.rank] = own
        return headers, bodies

    def _sum_shard(self, headers: list[Header], bodies: list[torch.Tensor], bucket: Bucket, sums: Sums) -> None:
        """The owned shard's mean, encoded."""
        plan, out = self._plans[bucket.index], self._gather_in[bucket.index].buffer
        start, stop = plan.adds
        if stop == start:
            return
        codec = self._codec(self.rank, bucket)
        if plan.whole:
            self._mean(headers, bodies, bucket, sums, self._means[bucket.index])
            return
        payload = out[: codec.capacity_bytes(stop - start, bucket.dtype)]
        in_place = codec.in_place(payload, bucket.dtype)
        total = self._sum[bucket.dtype][: stop - start] if in_place is None else in_place
        self._mean(headers, bodies, bucket, sums, total)
        if in_place is None:
            state = self._states.of_shard(bucket, start, stop, sums.step)
            codec.encode(total, payload, self._stamp(codec, bucket, sums.step, start, 1.0, stage=1), *state)

    def _mean(
        self, headers: list[Header], bodies: list[torch.Tensor], bucket: Bucket, sums: Sums, total: torch.Tensor
    ) -> None:
        self._add_up(headers, bodies, bucket, total)
        if sums.total_weight > 0 and (self.record.normalised or bucket.is_state):
            total.div_(sums.total_weight)

    def _add_up(self, headers: list[Header], bodies: list[torch.Tensor], bucket: Bucket, total: torch.Tensor) -> None:
        sent: list[tuple[int, torch.Tensor]] = [
            (sender, body)
            for sender, (header, body) in enumerate(zip(headers, bodies, strict=True))
            if header.contributes and body.numel() > 0
        ]
        if not sent:
            total.zero_()
            return
        first = self._seen(*sent[0], bucket)
        if first is None:
            self._decode(*sent[0], bucket, total)
            first = total
        for sender, body in sent[1:]:
            values = self._seen(sender, body, bucket)
            if values is not None:
                first = torch.add(first, values, out=total)
            else:
                if first is not total:
                    total.copy_(first)
                    first = total
                self._decode(sender, body, bucket, total, add=True)
        if first is not total:
            total.copy_(first)

    def _seen(self, sender: int, body: torch.Tensor, bucket: Bucket) -> torch.Tensor | None:
        """A sender's part of the owned shard, in its message, if it can be seen there."""
        codec, (start, stop) = self._codec(sender, bucket), self._plans[bucket.index].adds
        codec = self._dense if sender == self.rank and not self._plans[bucket.index].whole else codec
        return codec.in_place(body[: codec.capacity_bytes(stop - start, bucket.dtype)], bucket.dtype)

    def _decode(
        self, sender: int, payload: torch.Tensor, bucket: Bucket, out: torch.Tensor, *, add: bool = False
    ) -> None:
        codec = self._codec(sender, bucket)
        payload = payload[: codec.capacity_bytes(out.numel(), bucket.dtype)]
        try:
            if add:
                codec.add(payload, out, self._scratch[bucket.dtype][: out.numel()])
            else:
                codec.decode(payload, out)
        except ProtocolError as error:
            names = [s.name for s in bucket.segments]
            raise ProtocolError(
                f"{error} It came from worker {self.record.members[sender].slot}, with parameters "
                f"{names[0]!r} to {names[-1]!r}. It was not applied."
            ) from None

    def check(self, header: Header, bucket: Bucket, step: int, sender: int) -> None:
        """Raises ProtocolError where a peer is at another step or bucket than this member."""
        if (header.step, header.bucket) != (step, bucket.index):
            slot = self.record.members[sender].slot
            raise ProtocolError(
                f"worker {slot} is at step {header.step}, bucket {header.bucket}, while this one is at step {step}, "
                f"bucket {bucket.index}: the training functions do not take the same steps. Every worker must run the "
                "same loop."
            )

    def _launch(self, out: Parts, inp: Parts, expected: Any = None, *, flush: bool = False) -> Operation:
        self.traffic.sent += sum(inp.lengths) - inp.lengths[self.rank]
        self.traffic.received += sum(out.lengths) - out.lengths[self.rank]
        return self.group.all_to_all(out, inp, expected, flush=flush)


def _split(message: Parts, num_segments: int) -> list[tuple[HeaderPlace, torch.Tensor]]:
    """Header and payload of each part of a message."""
    header = header_bytes(num_segments)
    return [(header_place(part, num_segments), part[header:]) for part in message.buffer.split(message.lengths)]
