"""Owner shards: a reduce-scatter to owners, and an all-gather of the means.

1. Member ``i`` encodes each owner's shard of its weighted gradient ``w_i g_i`` and sends it there, behind a header that
   goes to every member (also to those that own nothing).
2. Each owner decodes the payloads and adds them up in rank order in fp32 (fp64 for fp64), divides by the sum of
   weights, and encodes the mean once. It sends that to all members, and all of them, itself included, decode the same
   bytes.

So replicas are identical to the bit, and a gradient is quantised twice, whatever the number of members.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Bucket, shard_bounds
from raytrain_het.allreduce.reducers.base import SendBuffer
from raytrain_het.allreduce.reducers.generation_group import GenerationGroup
from raytrain_het.allreduce.reducers.gradient_coder import GradientCoder, Payload
from raytrain_het.allreduce.reducers.to_owners import ShardsToOwners
from raytrain_het.allreduce.step_summary import SummarySoFar
from raytrain_het.allreduce.transport.group import Operation, PeerBuffers


class OwnerShardsReducer:
    """See the module's text, and :class:`~raytrain_het.allreduce.reducers.base.BucketReducer`.

    Args:
        members: the generation's.
        bucket: which one.
        coder: encodes, decodes and adds up.
    """

    num_operations: ClassVar[int] = 2

    def __init__(self, members: GenerationGroup, bucket: Bucket, coder: GradientCoder) -> None:
        self._members, self._bucket, self._coder = members, bucket, coder
        rank, size = members.rank, members.size
        shards = shard_bounds(bucket.numel, members.record.owners)
        self.owned = shards[rank]
        self._to_owners = ShardsToOwners(members, bucket, coder, shards, [self.owned] * size)
        self._own_mean = members.new_buffer(coder.payload_bytes(rank, bucket, self.owned))
        self._to_all = PeerBuffers.copies(self._own_mean, members.others, size)
        lengths = [coder.payload_bytes(k, bucket, shards[k]) if k != rank else 0 for k in range(size)]
        self._from_owners = members.new_buffers(lengths)
        received = self._from_owners.buffer.split(lengths)
        self._means = [
            (start, stop, Payload(owner, coder.codec(owner, bucket), self._own_mean if owner == rank else data))
            for owner, ((start, stop), data) in enumerate(zip(shards, received, strict=True))
            if stop > start
        ]
        """Each shard's bounds, and its mean as the owner has encoded it: the kept step, until the next one's comes."""
        coder.reserve(bucket.dtype, self.owned[1] - self.owned[0])

    @property
    def gradient_bytes(self) -> int:
        return self._coder.gradient_bytes(self._bucket)

    def send_buffers(self) -> list[SendBuffer] | None:
        return self._to_owners.send_buffers()

    def expect_step(self) -> None:
        self._to_owners.expect_step()

    def all_reduce(
        self, header: Header, local: torch.Tensor | None, weight: float, summary: SummarySoFar, *, noted: bool = False
    ) -> Iterator[Operation]:
        yield self._to_owners.send(header, local, weight)
        self._encode_own_mean(self._to_owners.received(summary, noted=noted), summary)
        yield self._members.launch(self._from_owners, self._to_all)

    def _encode_own_mean(self, payloads: list[Payload], summary: SummarySoFar) -> None:
        (start, stop), bucket = self.owned, self._bucket
        if stop == start:
            return
        codec = self._coder.codec(self._members.rank, bucket)
        encoded = self._own_mean[: codec.capacity_bytes(stop - start, bucket.dtype)]
        in_place = codec.in_place(encoded, bucket.dtype)
        if in_place is not None:
            self._coder.mean(payloads, bucket, summary, in_place)
            return
        mean = self._coder.room_for_sum(bucket.dtype, stop - start)
        self._coder.mean(payloads, bucket, summary, mean)
        self._coder.encode_mean(bucket, start, mean, encoded, summary.step)

    def decode(self, out: torch.Tensor) -> None:
        for start, stop, payload in self._means:
            self._coder.decode(payload, self._bucket, out[start:stop])
