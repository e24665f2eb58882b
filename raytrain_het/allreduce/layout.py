"""Which element travels where: pure functions of the parameters' names and sizes, and of the record.

Torch DDP's own layout changes after the first backward pass, so a joiner's would not match. This one does not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

ALIGN_BYTES = 16
"""Messages and their parts start at multiples of so many bytes, so every dtype can be viewed in place."""

SMALL = 1024
"""Compressing a parameter of fewer elements saves next to nothing, and loses as much as for any other."""


def aligned(num_bytes: int) -> int:
    """Round up to a multiple of :data:`ALIGN_BYTES`."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True)
class Segment:
    """One tensor's place in a bucket."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int

    @property
    def stop(self) -> int:
        """End of the segment, exclusive."""
        return self.offset + self.numel


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together, in one dtype."""

    index: int
    dtype: torch.dtype
    segments: tuple[Segment, ...]
    is_state: bool = False
    """Whether it holds the model's buffers (running statistics), and not gradients. Then it is dense, and not checked
    for finiteness."""
    is_dense: bool = False
    """Whether it travels as it is, whatever the codec."""

    @cached_property
    def numel(self) -> int:
        """Elements in the bucket."""
        return self.segments[-1].stop


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values are summed: fp32, or fp64 where the tensor is fp64."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


class Layout:
    """Buckets of gradients in reverse order of the parameters (about the order in which they become ready), then
    those of small parameters if these are kept apart, then those of buffers.

    Args:
        parameters: (name, tensor) of all parameters that are trained, in the model's order.
        buffers: (name, tensor) of the model's buffers.
        bucket_bytes: target size of a bucket; a larger parameter has one of its own.
        small_apart: parameters of one dimension or of fewer than :data:`SMALL` elements have dense buckets.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, torch.Tensor]],
        buffers: Sequence[tuple[str, torch.Tensor]],
        bucket_bytes: int,
        *,
        small_apart: bool = False,
    ) -> None:
        self.buckets: list[Bucket] = []
        small = {name for name, p in parameters if small_apart and (p.dim() < 2 or p.numel() < SMALL)}
        gradients = [(name, p) for name, p in reversed(parameters) if name not in small]
        dense = [(name, p) for name, p in reversed(parameters) if name in small]
        for named, is_state, is_dense in ((gradients, False, False), (dense, False, True), (list(buffers), True, True)):
            pending: list[tuple[str, torch.Tensor]] = []
            size = 0
            for name, tensor in named:
                nbytes = tensor.numel() * wire_dtype(tensor.dtype).itemsize
                changes = bool(pending) and wire_dtype(pending[0][1].dtype) != wire_dtype(tensor.dtype)
                if pending and (changes or size + nbytes > bucket_bytes):
                    self._close(pending, is_state, is_dense)
                    pending, size = [], 0
                pending.append((name, tensor))
                size += nbytes
            if pending:
                self._close(pending, is_state, is_dense)

    def _close(self, named: list[tuple[str, torch.Tensor]], is_state: bool, is_dense: bool) -> None:
        segments, offset = [], 0
        for name, tensor in named:
            segments.append(Segment(name, tuple(tensor.shape), offset, tensor.numel()))
            offset += tensor.numel()
        dtype = wire_dtype(named[0][1].dtype)
        self.buckets.append(Bucket(len(self.buckets), dtype, tuple(segments), is_state, is_dense))

    @property
    def num_compressed(self) -> int:
        """Elements that a codec encodes."""
        return sum(map(math.prod, self.compressed_shapes))

    @property
    def compressed_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all tensors that a codec encodes."""
        return [segment.shape for bucket in self.buckets if not bucket.is_dense for segment in bucket.segments]

    @cached_property
    def fingerprint(self) -> str:
        """Short digest of all names, shapes and places; equal on all workers of a run."""
        text = repr([(b.dtype, b.is_state, b.is_dense, b.segments) for b in self.buckets])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_bounds(numel: int, owners: Sequence[float]) -> list[tuple[int, int]]:
    """Cut ``numel`` elements among owners in proportion; bounds are multiples of 16 elements where there are enough.

    Args:
        numel: elements of the bucket.
        owners: relative sizes by rank; 0 owns nothing.

    Returns:
        (start, stop) by rank; they tile ``range(numel)`` in rank order.
    """
    total = sum(owners)
    grain = 16 if numel >= 16 * len(owners) else 1
    bounds, done, start = [], 0.0, 0
    last = max(rank for rank, size in enumerate(owners) if size > 0)
    for rank, size in enumerate(owners):
        done += size
        stop = numel if rank >= last else min(numel, round(numel * (done / total) / grain) * grain)
        stop = max(stop, start)
        bounds.append((start, stop if size > 0 else start))
        start = bounds[-1][1]
    return bounds


def is_finite(x: torch.Tensor) -> bool:
    """Whether no element is infinite or NaN."""
    # A finite sum proves it in one cheap pass; sums of finite values may overflow, so only then each is looked at.
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())
