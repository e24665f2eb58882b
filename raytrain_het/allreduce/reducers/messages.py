"""The first operation of a bucket's all-reduce: every member sends every other one a header, and a payload behind it.

Sizes are pure functions of the record and the bucket, the same on both ends. A message of another length is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from raytrain_het.allreduce.header import Header, HeaderPlace, header_bytes, header_place, read_header, write_header
from raytrain_het.allreduce.layout import Bucket
from raytrain_het.allreduce.reducers.generation_group import GenerationGroup
from raytrain_het.allreduce.step_summary import SummarySoFar
from raytrain_het.allreduce.transport.group import Operation, PeerBuffers


class BucketMessages:
    """One bucket's messages of one generation, with buffers of their own.

    Args:
        members: the generation's.
        bucket: which one.
        payload_bytes: by receiver: bytes of the payload that this member sends; 0 to itself.
        incoming_bytes: by sender: bytes of the payload that comes here; 0 from itself.
    """

    def __init__(
        self, members: GenerationGroup, bucket: Bucket, payload_bytes: Sequence[int], incoming_bytes: Sequence[int]
    ) -> None:
        self._members, self._bucket = members, bucket
        head = header_bytes(len(bucket.segments))
        self._sent = members.new_buffers([head + length for length in payload_bytes])
        self._received = members.new_buffers([head + length for length in incoming_bytes])
        self._sent_headers, self.outgoing = _split(self._sent, len(bucket.segments))
        """``outgoing``: by receiver, where the payload is encoded, uint8."""
        self._received_headers, self.incoming = _split(self._received, len(bucket.segments))
        """``incoming``: by sender, where the payload lands, uint8."""
        self._expected: Any = None

    def expect_step(self) -> None:
        """Receive what peers send for the step from now on."""
        self._expected = self._members.group.expect(self._received)

    def send(self, header: Header, *, flush: bool) -> Operation:
        """Send all messages, with this header. The payloads must be in place."""
        write_header(header, len(self._bucket.segments), *self._sent_headers)
        expected, self._expected = self._expected, None
        return self._members.launch(self._received, self._sent, expected, flush=flush)

    def read_headers(self, summary: SummarySoFar, *, noted: bool) -> list[Header]:
        """All members' headers by rank, checked, and noted in ``summary`` unless they are already.

        Raises:
            ProtocolError: a peer is at another step or bucket.
        """
        headers = []
        for sender, place in enumerate(self._received_headers):
            header = read_header(place, len(self._bucket.segments))
            self._members.check_header(header, self._bucket.index, summary.step, sender)
            headers.append(header)
        if not noted:
            summary.note(self._bucket, headers, self._members.record.members)
        return headers


def _split(buffers: PeerBuffers, num_segments: int) -> tuple[list[HeaderPlace], list[torch.Tensor]]:
    """The header and the payload of each message."""
    head, messages = header_bytes(num_segments), buffers.buffer.split(buffers.lengths)
    return [header_place(message, num_segments) for message in messages], [message[head:] for message in messages]
