"""The first operation of a bucket's all-reduce: a header, and a payload behind it, to whoever adds up.

Sizes are pure functions of the record and the bucket, the same on both ends. A message of another length is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Bucket
from raytrain_het.allreduce.reducers.generation_group import GenerationGroup
from raytrain_het.allreduce.transport.group import Operation, PeerBuffers


class BucketMessages:
    """One bucket's messages of one generation, with buffers of their own.

    Args:
        members: the generation's.
        bucket: which one.
        payload_bytes: by receiver: bytes of the payload that this member sends; None where it sends nothing.
        incoming_bytes: by sender: bytes of the payload that comes here; None where nothing comes.
    """

    def __init__(
        self,
        members: GenerationGroup,
        bucket: Bucket,
        payload_bytes: Sequence[int | None],
        incoming_bytes: Sequence[int | None],
    ) -> None:
        self._members, self._bucket = members, bucket
        self._format = members.header_format(bucket)
        head = self._format.num_bytes

        def buffers(lengths: Sequence[int | None]) -> PeerBuffers:
            return members.new_buffers([0 if length is None else head + length for length in lengths])

        self._sent, self._received = buffers(payload_bytes), buffers(incoming_bytes)
        sent, received = self._messages(self._sent), self._messages(self._received)
        self._sent_headers = [self._format.place(message) for message in sent if message.numel()]
        self._senders = {rank: self._format.place(message) for rank, message in enumerate(received) if message.numel()}
        """By rank of those that something comes from: where its header lands."""
        self.outgoing = [message[head:] for message in sent]
        """By receiver: where the payload is encoded, uint8."""
        self.incoming = [message[head:] for message in received]
        """By sender: where the payload lands, uint8."""
        self._expected: Any = None

    @staticmethod
    def _messages(buffers: PeerBuffers) -> Sequence[torch.Tensor]:
        return buffers.buffer.split(buffers.lengths)

    def expect_step(self) -> None:
        """Receive what peers send for the step from now on."""
        self._expected = self._members.group.expect(self._received)

    def send(self, header: Header, *, flush: bool) -> Operation:
        """Send all messages, with this header. The payloads must be in place."""
        self._format.write(header, *self._sent_headers)
        expected, self._expected = self._expected, None
        return self._members.launch(self._received, self._sent, expected, flush=flush)

    def headers(self, own: Header) -> dict[int, Header]:
        """By rank, in rank order: what members say that something comes from, and this member's own.

        Raises:
            ProtocolError: a peer is at another step or bucket.
        """
        headers = {self._members.rank: own}
        for sender, place in self._senders.items():
            headers[sender] = self._format.read(place)
            self._members.check_header(headers[sender], self._bucket.index, own.step, sender)
        return dict(sorted(headers.items()))
