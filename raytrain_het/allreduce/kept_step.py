"""The means of a step as bytes: what a member that is one step behind gets from one that holds the step."""

from __future__ import annotations

import torch

from raytrain_het.allreduce.header import Header, header_bytes, read_header, write_header
from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.reducers import Reducer
from raytrain_het.allreduce.step_summary import StepSummary

_ALIGNMENT = 16


def packed_bytes(layout: Layout) -> int:
    """Bytes of a step's sums: by bucket a header, and its values padded to 16 bytes."""
    return sum(header_bytes(len(b.segments)) + _padded(b.numel * b.dtype.itemsize) for b in layout.buckets)


def pack(summary: StepSummary, reducer: Reducer, layout: Layout) -> torch.Tensor:
    """A kept step as (packed_bytes,) uint8. ``reducer`` still holds what the owners sent."""
    data, place = torch.zeros(packed_bytes(layout), dtype=torch.uint8), 0
    for bucket in layout.buckets:
        size = header_bytes(len(bucket.segments))
        header = Header(
            step=summary.step,
            generation=reducer.record.number,
            bucket=bucket.index,
            want=0,
            weight=summary.total_weight,
            finite=summary.finite,
            contributes=True,
            digest=0,
            used=summary.used[bucket.index],
        )
        write_header(header, len(bucket.segments), data[place : place + size])
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
        header = read_header(data[place:], len(bucket.segments))
        place += header_bytes(len(bucket.segments))
        weight, finite = header.weight, header.finite
        used.append(header.used)
        size = bucket.numel * bucket.dtype.itemsize
        outs[bucket.index].copy_(data[place : place + size].view(bucket.dtype))
        place += _padded(size)
    return StepSummary(step=step, total_weight=weight, finite=finite, used=tuple(used))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
