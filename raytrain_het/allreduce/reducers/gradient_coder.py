"""Gradients into payloads, with error feedback, and payloads into sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from raytrain_het.allreduce.codecs import RESIDUAL, Codec, Stamp, State, codec_of, mix
from raytrain_het.allreduce.compression_error import CompressionErrorMeter
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Bucket, aligned
from raytrain_het.allreduce.reducers.generation_group import GenerationGroup
from raytrain_het.errors import ProtocolError

_NO_STAMP = Stamp()


class Payload(NamedTuple):
    """What one member contributes to a sum."""

    sender: int
    codec: Codec
    data: torch.Tensor
    """uint8, padded behind the codec's capacity."""


class GradientCoder:
    """Encodes one member's gradients, and decodes and adds up those of all members of its generation.

    Args:
        members: the generation's.
        codecs: by rank. Dense buckets travel as they are whatever the codecs.
        feedback: what this member's codec remembers.
        error_meter: measures now and then what encoding loses.
        num_buckets: of the layout.
    """

    def __init__(
        self,
        members: GenerationGroup,
        codecs: Sequence[Codec],
        feedback: ErrorFeedback,
        error_meter: CompressionErrorMeter,
        num_buckets: int,
    ) -> None:
        self.members, self.feedback = members, feedback
        self._codecs, self._error_meter, self._num_buckets = codecs, error_meter, num_buckets
        self.dense = codec_of("none")
        self._sums: dict[torch.dtype, torch.Tensor] = {}
        self._scratch: dict[torch.dtype, torch.Tensor] = {}

    def codec(self, rank: int, bucket: Bucket) -> Codec:
        """The codec in which a member's gradients of a bucket travel."""
        return self.dense if bucket.is_dense else self._codecs[rank]

    def payload_bytes(self, rank: int, bucket: Bucket, bounds: tuple[int, int]) -> int:
        """Bytes of a member's payload of these elements of a bucket, padded; 0 for none."""
        start, stop = bounds
        return aligned(self.codec(rank, bucket).capacity_bytes(stop - start, bucket.dtype)) if stop > start else 0

    def gradient_bytes(self, bucket: Bucket) -> int:
        """Bytes of this member's whole gradient of a bucket, not padded."""
        return self.codec(self.members.rank, bucket).capacity_bytes(bucket.numel, bucket.dtype)

    # ---------------------------------------------------------------- encoding

    def encode_gradient(
        self, bucket: Bucket, start: int, shard: torch.Tensor, body: torch.Tensor, header: Header, weight: float
    ) -> None:
        """Encode this member's gradient of some elements, and the residual of earlier ones.

        Args:
            bucket: which one.
            start: the first of the elements.
            shard: the weighted gradient (n,).
            body: where the payload goes, uint8, padded.
            header: what this member says of its gradient.
            weight: that the sum will be divided by, as far as it is known.
        """
        rank, stop = self.members.rank, start + shard.numel()
        codec = self.codec(rank, bucket)
        kept: State = {}
        following: State = {}
        if header.contributes and not bucket.is_dense:  # A gradient that nobody uses leaves no trace.
            kept, following = self.feedback.of_shard(bucket, start, stop, header.step)
            if kept:
                shard = shard.to(self.members.device)  # Where state and payload are.
        stamp = self._stamp(codec, bucket, header.step, start, weight, stage=0)
        payload = body[: codec.capacity_bytes(stop - start, bucket.dtype)]
        codec.encode(shard, payload, stamp, kept, following)
        if header.contributes and not bucket.is_dense and self.measures_error(bucket, header.step):
            residual = following[RESIDUAL] * weight if RESIDUAL in following else None
            word = self.members.record.codecs[rank]
            self._error_meter.measure(header.step, word, codec, payload, shard=shard, residual=residual)

    def encode_mean(self, bucket: Bucket, start: int, mean: torch.Tensor, payload: torch.Tensor, step: int) -> None:
        """Encode the mean (n,) of elements that this member owns; what that leaves out is added to the next mean."""
        codec = self.codec(self.members.rank, bucket)
        state = self.feedback.of_shard(bucket, start, start + mean.numel(), step)
        codec.encode(mean, payload, self._stamp(codec, bucket, step, start, 1.0, stage=1), *state)

    def _stamp(self, codec: Codec, bucket: Bucket, step: int, start: int, weight: float, *, stage: int) -> Stamp:
        if not codec.uses_stamp:
            return _NO_STAMP
        slot = self.members.record.members[self.members.rank].slot
        return Stamp(mix(step, bucket.index, start, slot, stage), mix(step, bucket.index, start), weight)

    def measures_error(self, bucket: Bucket, step: int) -> bool:
        """Whether it is time to measure what encoding this bucket loses."""
        return self._error_meter.is_due(step, bucket.index, self._num_buckets)

    def record_error(self, step: int, error: float) -> None:
        """Record a loss that the caller has measured itself."""
        self._error_meter.record(step, self.members.record.codecs[self.members.rank], error)

    # ---------------------------------------------------------------- decoding and adding up

    def reserve(self, dtype: torch.dtype, num_elements: int) -> None:
        """Have memory for sums of so many elements. Buckets use it one after the other."""
        if dtype not in self._sums or self._sums[dtype].numel() < num_elements:
            self._sums[dtype] = torch.empty(num_elements, dtype=dtype, device=self.members.device)
            self._scratch[dtype] = torch.empty_like(self._sums[dtype])

    def room_for_sum(self, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
        """(num_elements,) not zeroed, good until the next bucket's."""
        return self._sums[dtype][:num_elements]

    def mean(self, payloads: Sequence[Payload], bucket: Bucket, total_weight: float, out: torch.Tensor) -> None:
        """Write the weighted mean of what all members contribute to some elements into ``out`` (n,)."""
        self.add_up(payloads, bucket, out)
        if total_weight > 0 and (self.members.record.normalised or bucket.is_state):
            out.div_(total_weight)

    def add_up(self, payloads: Sequence[Payload], bucket: Bucket, out: torch.Tensor) -> None:
        """Write the sum of payloads, in the order in which they are given, into ``out`` (n,).

        Payloads that hold values as they are, are added from where they lie.
        """
        if not payloads:
            out.zero_()
            return
        capacity = payloads[0].codec.capacity_bytes(out.numel(), bucket.dtype)
        first = payloads[0].codec.in_place(payloads[0].data[:capacity], bucket.dtype)
        if first is None:
            self.decode(payloads[0], bucket, out)
            first = out
        for payload in payloads[1:]:
            capacity = payload.codec.capacity_bytes(out.numel(), bucket.dtype)
            values = payload.codec.in_place(payload.data[:capacity], bucket.dtype)
            if values is not None:
                first = torch.add(first, values, out=out)
            else:
                if first is not out:
                    out.copy_(first)
                    first = out
                self.decode(payload, bucket, out, add=True)
        if first is not out:
            out.copy_(first)

    def decode(self, payload: Payload, bucket: Bucket, out: torch.Tensor, *, add: bool = False) -> None:
        """Decode a payload into ``out`` (n,), or add it to that.

        Raises:
            ProtocolError: it does not decode; the message says who sent it.
        """
        codec = payload.codec
        data = payload.data[: codec.capacity_bytes(out.numel(), bucket.dtype)]
        try:
            if add:
                codec.add(data, out, self._scratch[bucket.dtype][: out.numel()])
            else:
                codec.decode(data, out)
        except ProtocolError as error:
            names = [s.name for s in bucket.segments]
            raise ProtocolError(
                f"{error} It came from worker {self.members.record.members[payload.sender].slot}, with parameters "
                f"{names[0]!r} to {names[-1]!r}. It was not applied."
            ) from None
