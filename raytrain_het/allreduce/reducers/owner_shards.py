"""Owner shards: a reduce-scatter to owners, and an all-gather of the means.

1. Member ``i`` encodes each owner's shard of its weighted gradient ``w_i g_i`` and sends it there, behind a header.
2. Each owner decodes the payloads and adds them up in rank order in fp32 (fp64 for fp64), divides by the sum of
   weights, and encodes the mean once. It sends that to all members behind the merged header, and all of them, itself
   included, decode the same bytes.

So replicas are identical to the bit, and a gradient is quantised twice, whatever the number of members.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

import torch

from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Bucket
from raytrain_het.allreduce.reducers.base import SendBuffer
from raytrain_het.allreduce.reducers.generation_group import GenerationGroup
from raytrain_het.allreduce.reducers.gradient_coder import GradientCoder, Payload
from raytrain_het.allreduce.reducers.to_owners import ShardsToOwners
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
        num_bytes = max(coder.payload_bytes(k, bucket, (0, bucket.numel)) for k in range(size))
        shards = members.sharding.bounds(bucket.numel, num_bytes)
        self.owned = shards[rank] or (0, 0)
        self._to_owners = ShardsToOwners(members, bucket, coder, shards, [shards[rank]] * size)
        self._format = members.header_format(bucket)
        head = self._format.num_bytes
        lengths = [
            0 if shard is None else head + coder.payload_bytes(k, bucket, shard) for k, shard in enumerate(shards)
        ]
        own = members.new_buffer(lengths[rank])
        self._own_header, self._own_mean = self._format.place(own), own[head:]
        self._to_all = PeerBuffers.copies(own, members.others if lengths[rank] else [], size)
        self._from_owners = members.new_buffers([length if k != rank else 0 for k, length in enumerate(lengths)])
        received = self._from_owners.buffer.split(self._from_owners.lengths)
        messages = {k: own if k == rank else received[k] for k, length in enumerate(lengths) if length}
        """By rank of the owners: the merged header, and the mean behind it."""
        self._owners = list(messages)
        self._header_of_all = self._format.place(messages[self._owners[0]])
        self._means = [
            (*(shards[owner] or (0, 0)), Payload(owner, coder.codec(owner, bucket), message[head:]))
            for owner, message in messages.items()
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
        self, header: Header, local: torch.Tensor | None, weight: float
    ) -> Generator[Operation, None, Header]:
        yield self._to_owners.send(header, local, weight)
        if self._members.rank in self._owners:
            of_all, payloads = self._to_owners.received(header)
            self._format.write(of_all, self._own_header)
            self._encode_own_mean(payloads, of_all)
        yield self._members.launch(self._from_owners, self._to_all)
        # Of one owner, the same for all members: another one may have added up the weights in another Python.
        of_all = self._format.read(self._header_of_all)
        self._members.check_header(of_all, self._bucket.index, header.step, self._owners[0])
        return of_all

    def _encode_own_mean(self, payloads: list[Payload], of_all: Header) -> None:
        (start, stop), bucket = self.owned, self._bucket
        codec = self._coder.codec(self._members.rank, bucket)
        encoded = self._own_mean[: codec.capacity_bytes(stop - start, bucket.dtype)]
        in_place = codec.in_place(encoded, bucket.dtype)
        if in_place is not None:
            self._coder.mean(payloads, bucket, of_all.weight, in_place)
            return
        mean = self._coder.room_for_sum(bucket.dtype, stop - start)
        self._coder.mean(payloads, bucket, of_all.weight, mean)
        self._coder.encode_mean(bucket, start, mean, encoded, of_all.step)

    def decode(self, out: torch.Tensor) -> None:
        for start, stop, payload in self._means:
            self._coder.decode(payload, self._bucket, out[start:stop])
