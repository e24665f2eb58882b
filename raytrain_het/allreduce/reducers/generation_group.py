"""The members of a generation, as one of them reaches them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raytrain_het.allreduce.header import Header, HeaderFormat
from raytrain_het.allreduce.layout import Bucket
from raytrain_het.allreduce.reducers.sharding import Sharding
from raytrain_het.allreduce.transport.group import Group, Operation, PeerBuffers
from raytrain_het.errors import ProtocolError
from raytrain_het.membership.record import Record


@dataclass
class Traffic:
    """Bytes to and from other members, headers included."""

    sent: int = 0
    received: int = 0

    def take(self, other: Traffic) -> None:
        """Add another count to this one, and set that to 0."""
        self.sent, self.received = self.sent + other.sent, self.received + other.received
        other.sent = other.received = 0


class GenerationGroup:
    """A generation's record, this member's rank in it, and its process group, whose bytes are counted here.

    Args:
        record: the generation.
        rank: this member's rank.
        group: the process group of the record's members.
        traffic: where bytes are counted; left out, a count of its own.
        num_speakers: how many members' headers are merged on their way; left out, those of the record.
    """

    def __init__(
        self,
        record: Record,
        rank: int,
        group: Group,
        traffic: Traffic | None = None,
        *,
        num_speakers: int | None = None,
    ) -> None:
        self.record, self.rank, self.group = record, rank, group
        self.size = len(record.members)
        self.traffic = traffic if traffic is not None else Traffic()
        self.sends = [share > 0 for share in record.shares]
        """By rank: whether the member has gradients to send. One with an empty share sends headers only."""
        self.others = [other for other in range(self.size) if other != rank]
        self.sharding = Sharding(record)
        self._num_speakers = num_speakers or self.size

    @property
    def device(self) -> torch.device:
        """Where messages are."""
        return self.group.device

    def new_buffer(self, num_bytes: int) -> torch.Tensor:
        """(num_bytes,) uint8, not zeroed."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def new_buffers(self, lengths: Sequence[int]) -> PeerBuffers:
        """Messages to or from all members, not zeroed."""
        return PeerBuffers(self.new_buffer(sum(lengths)), lengths)

    def header_format(self, bucket: Bucket) -> HeaderFormat:
        """Of a bucket's headers in this generation."""
        return HeaderFormat(len(bucket.segments), self._num_speakers)

    def launch(self, out: PeerBuffers, inp: PeerBuffers, expected: Any = None, *, flush: bool = False) -> Operation:
        """Count the bytes of an all-to-all, and launch it (``Group.all_to_all``)."""
        self.traffic.sent += sum(inp.lengths) - inp.lengths[self.rank]
        self.traffic.received += sum(out.lengths) - out.lengths[self.rank]
        return self.group.all_to_all(out, inp, expected, flush=flush)

    def check_header(self, header: Header, bucket: int, step: int, sender: int) -> None:
        """Raises ProtocolError where a peer is at another step or bucket than this member."""
        if (header.step, header.bucket) != (step, bucket):
            slot = self.record.members[sender].slot
            raise ProtocolError(
                f"worker {slot} is at step {header.step}, bucket {header.bucket}, while this one is at step {step}, "
                f"bucket {bucket}: the training functions do not take the same steps. Every worker must run the "
                "same loop."
            )
