"""All-gather: every member sends its whole payload to every other one, and all add up the same payloads in rank order.

A gradient is quantised once, and there is no second operation. It takes ``N - 1`` payloads a member, where owner shards
take ``2 (N - 1) / N``.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import ClassVar

import torch

from raytrain_het.allreduce.header import Header, merged
from raytrain_het.allreduce.layout import Bucket
from raytrain_het.allreduce.reducers.base import SendBuffer
from raytrain_het.allreduce.reducers.generation_group import GenerationGroup
from raytrain_het.allreduce.reducers.gradient_coder import GradientCoder, Payload
from raytrain_het.allreduce.reducers.messages import BucketMessages
from raytrain_het.allreduce.transport.group import Operation


class AllGatherReducer:
    """See the module's text, and :class:`~raytrain_het.allreduce.reducers.base.BucketReducer`.

    Args:
        members: the generation's.
        bucket: which one, not a dense one.
        coder: encodes, decodes and adds up.
    """

    num_operations: ClassVar[int] = 1

    def __init__(self, members: GenerationGroup, bucket: Bucket, coder: GradientCoder) -> None:
        self._members, self._bucket, self._coder = members, bucket, coder
        rank, whole = members.rank, (0, bucket.numel)
        lengths = [coder.payload_bytes(k, bucket, whole) if members.sends[k] else 0 for k in range(members.size)]
        self._messages = BucketMessages(
            members,
            bucket,
            [lengths[rank] if receiver != rank else None for receiver in range(members.size)],
            [length if sender != rank else None for sender, length in enumerate(lengths)],
        )
        self._own_room = members.new_buffer(coder.payload_bytes(rank, bucket, whole))
        self._own: torch.Tensor | None = None
        """This member's payload, once it has sent one."""
        self._mean = torch.empty(bucket.numel, dtype=bucket.dtype, device=members.device)
        coder.reserve(bucket.dtype, bucket.numel)

    @property
    def owned(self) -> tuple[int, int]:
        return 0, 0

    @property
    def gradient_bytes(self) -> int:
        return self._coder.gradient_bytes(self._bucket)

    def send_buffers(self) -> list[SendBuffer] | None:
        return None

    def expect_step(self) -> None:
        self._messages.expect_step()

    def all_reduce(
        self, header: Header, local: torch.Tensor | None, weight: float
    ) -> Generator[Operation, None, Header]:
        if local is None:
            self._own = None
        elif self._members.sends[self._members.rank]:
            self._encode(header, local, weight)
        if not (self._members.sends[self._members.rank] and header.contributes):
            self._coder.feedback.carry_over(self._bucket, 0, self._bucket.numel, header.step)
        # Flush: a peer may begin the next step before this member's payload has reached the others.
        yield self._messages.send(header, flush=True)
        headers = self._messages.headers(header)
        of_all = merged(headers.values())
        self._coder.mean(self._payloads(headers), self._bucket, of_all.weight, self._mean)
        return of_all

    def _encode(self, header: Header, local: torch.Tensor, weight: float) -> None:
        self._own = self._own_room
        self._coder.encode_gradient(self._bucket, 0, local, self._own, header, weight)
        for receiver in self._members.others:
            self._messages.outgoing[receiver].copy_(self._own)

    def _payloads(self, headers: Mapping[int, Header]) -> list[Payload]:
        payloads, rank = [], self._members.rank
        for sender, header in headers.items():
            own = self._own if sender == rank else None
            data = own if own is not None else self._messages.incoming[sender]
            if header.contributes and data.numel() > 0:
                payloads.append(Payload(sender, self._coder.codec(sender, self._bucket), data))
        return payloads

    def decode(self, out: torch.Tensor) -> None:
        out.copy_(self._mean)
