"""The first half of an all-reduce by owners: every member's gradient is cut into shards, which go to their owners."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raytrain_het.allreduce.header import Header, merged
from raytrain_het.allreduce.layout import Bucket
from raytrain_het.allreduce.reducers.base import SendBuffer
from raytrain_het.allreduce.reducers.generation_group import GenerationGroup
from raytrain_het.allreduce.reducers.gradient_coder import GradientCoder, Payload
from raytrain_het.allreduce.reducers.messages import BucketMessages
from raytrain_het.allreduce.reducers.sharding import Shard
from raytrain_het.allreduce.transport.group import Operation


class ShardsToOwners:
    """One bucket's shards on their way to the members that add them up.

    A member's shard for itself stays as and where it is: it is added up without being encoded.

    Args:
        members: the generation's.
        bucket: which one.
        coder: encodes the shards for others.
        shards: by receiver: the elements that this member sends there, None for nothing; its own part is at its own
            rank.
        incoming: by sender: the elements that come here, None for nothing.
    """

    def __init__(
        self,
        members: GenerationGroup,
        bucket: Bucket,
        coder: GradientCoder,
        shards: Sequence[Shard | None],
        incoming: Sequence[Shard | None],
    ) -> None:
        self._members, self._bucket, self._coder = members, bucket, coder
        self._shards = [(receiver, *shard) for receiver, shard in enumerate(shards) if shard and shard[0] < shard[1]]
        """By receiver: the first element that goes there, and the one behind the last."""
        rank, sends = members.rank, members.sends
        self._messages = BucketMessages(
            members,
            bucket,
            [
                _payload_bytes(coder, rank, bucket, part, sends=sends[rank]) if receiver != rank else None
                for receiver, part in enumerate(shards)
            ],
            [
                _payload_bytes(coder, sender, bucket, part, sends=sends[sender]) if sender != rank else None
                for sender, part in enumerate(incoming)
            ],
        )
        self._own: torch.Tensor | None = None
        """This member's shard for itself, uint8, wherever it is."""
        self._gathered_own: torch.Tensor | None = None
        """The memory for it where gradients are gathered in :meth:`send_buffers`."""

    def send_buffers(self) -> list[SendBuffer] | None:
        """See :meth:`raytrain_het.allreduce.reducers.base.BucketReducer.send_buffers`."""
        bucket, rank = self._bucket, self._members.rank
        if bucket.is_state or not self._members.sends[rank]:
            return None
        codec, buffers = self._coder.codec(rank, bucket), []
        for receiver, start, stop in self._shards:
            capacity = codec.capacity_bytes(stop - start, bucket.dtype)
            own = torch.empty(capacity, dtype=torch.uint8) if receiver == rank else None
            place = own if own is not None else self._messages.outgoing[receiver][:capacity]
            values = codec.in_place(place, bucket.dtype)
            if values is None:
                return None
            if own is not None:
                self._gathered_own = own
            buffers.append((start, stop, values))
        return buffers

    def expect_step(self) -> None:
        """Receive what peers send for the step from now on."""
        self._messages.expect_step()

    def send(self, header: Header, local: torch.Tensor | None, weight: float) -> Operation:
        """Send each owner the header, and its shard.

        Args:
            header: what this member says of its gradient.
            local: the weighted gradient (n,), which may be changed; None where it was gathered in
                :meth:`send_buffers`, or this member sends nothing.
            weight: that the sum will be divided by, as far as it is known.
        """
        if local is None:
            self._own = self._gathered_own
        elif self._members.sends[self._members.rank]:
            self._encode(header, local, weight)
        if not self._bucket.is_dense and not (self._members.sends[self._members.rank] and header.contributes):
            for receiver, start, stop in self._shards:
                if receiver != self._members.rank:
                    self._coder.feedback.carry_over(self._bucket, start, stop, header.step)
        # No flush: an owner begins no further step before it has all that was sent to it.
        return self._messages.send(header, flush=False)

    def _encode(self, header: Header, local: torch.Tensor, weight: float) -> None:
        for receiver, start, stop in self._shards:
            shard = local[start:stop]
            if receiver == self._members.rank:
                self._own = shard.to(self._members.device).view(torch.uint8)
            else:
                body = self._messages.outgoing[receiver]
                self._coder.encode_gradient(self._bucket, start, shard, body, header, weight)

    def received(self, own: Header) -> tuple[Header, list[Payload]]:
        """What all members that send here say together, and what they contribute to this one's part in rank order, its
        own contribution included.

        Args:
            own: this member's header.
        """
        payloads, rank = [], self._members.rank
        headers = self._messages.headers(own)
        for sender, header in headers.items():
            data = self._messages.incoming[sender]
            codec = self._coder.codec(sender, self._bucket)
            if sender == rank:
                data, codec = self._own if self._own is not None else data, self._coder.dense
            if header.contributes and data.numel() > 0:
                payloads.append(Payload(sender, codec, data))
        return merged(headers.values()), payloads


def _payload_bytes(coder: GradientCoder, rank: int, bucket: Bucket, shard: Shard | None, *, sends: bool) -> int | None:
    """Bytes of a member's payload of these elements: 0 for a header only, None for no message."""
    return None if shard is None else coder.payload_bytes(rank, bucket, shard) if sends else 0
