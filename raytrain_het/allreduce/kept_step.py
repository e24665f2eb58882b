"""The means of a step as bytes: what a member that is one step behind gets from one that holds the step."""

from __future__ import annotations

import torch

from raytrain_het.allreduce.header import Header, HeaderFormat
from raytrain_het.allreduce.layout import Bucket, Layout
from raytrain_het.allreduce.reducers import Reducer
from raytrain_het.allreduce.step_summary import StepSummary

_ALIGNMENT = 16


def packed_bytes(layout: Layout) -> int:
    """Bytes of a step's sums: by bucket a header, and its values padded to 16 bytes."""
    return sum(_format(b).num_bytes + _padded(b.numel * b.dtype.itemsize) for b in layout.buckets)


def pack(summary: StepSummary, reducer: Reducer, layout: Layout) -> torch.Tensor:
    """A kept step as (packed_bytes,) uint8. ``reducer`` still holds what the owners sent."""
    data, place = torch.zeros(packed_bytes(layout), dtype=torch.uint8), 0
    for bucket in layout.buckets:
        size = _format(bucket).num_bytes
        header = Header(
            step=summary.step,
            generation=reducer.record.number,
            bucket=bucket.index,
            want=0,
            weight=summary.total_weight,
            contributes=True,
            used=summary.used[bucket.index],
            nonfinite=int(not summary.finite),
        )
        _format(bucket).write(header, data[place : place + size])
        place += size
        values = torch.empty(bucket.numel, dtype=bucket.dtype)
        reducer.decode(bucket, values)
        raw = values.view(torch.uint8)
        data[place : place + raw.numel()] = raw
        place += _padded(raw.numel())
    return data


def unpack(data: torch.Tensor, layout: Layout, step: int, outs: list[torch.Tensor]) -> StepSummary:
    """The inverse of :func:`pack`: values go to ``outs`` by bucket, the rest is returned."""
    place, used, weight, finite = 0, [], 0.0, True
    for bucket in layout.buckets:
        header = _format(bucket).read(data[place:])
        place += _format(bucket).num_bytes
        weight, finite = header.weight, not header.nonfinite
        used.append(header.used)
        size = bucket.numel * bucket.dtype.itemsize
        outs[bucket.index].copy_(data[place : place + size].view(bucket.dtype))
        place += _padded(size)
    return StepSummary(step=step, total_weight=weight, finite=finite, used=tuple(used))


def _format(bucket: Bucket) -> HeaderFormat:
    """Of a header that says only whether any gradient is not finite, for the sender's ranks may be of another
    generation than the receiver's."""
    return HeaderFormat(len(bucket.segments), 1)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
