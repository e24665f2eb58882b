"""A bucket whose matrices travel as two thin factors (:class:`raytrain_het.allreduce.codecs.lowrank.LowRank`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from raytrain_het.allreduce.codecs import Codec
from raytrain_het.allreduce.codecs.lowrank import LowRank, multiply, orthonormalise, subtract_product
from raytrain_het.allreduce.layout import Bucket, Layout, Segment
from raytrain_het.membership.record import Record


@dataclass(frozen=True)
class _Matrix:
    """Where a matrix is in its bucket, and its factors are in theirs."""

    whole: slice
    shape: tuple[int, int]
    first: slice
    second: slice


class Factors:
    """One bucket's, in one generation: two buckets that travel as they are, one after the other.

    The *first* holds ``P`` of every matrix, and all tensors that stay whole; the *second* holds ``Q``, and is None
    without a matrix. In a generation's first step the power iteration starts from random numbers: so whoever has come
    or is behind has nothing to catch up with.

    Args:
        bucket: the gradient's.
        codec: says which tensors are matrices.
        second: index of the second bucket, among all that travel.
        seed: the same on all members.
        device: where the factors are.
    """

    def __init__(self, bucket: Bucket, codec: LowRank, *, second: int, seed: int, device: torch.device) -> None:
        self.first, self.second, self._matrices, self._kept = _factor_buckets(bucket, codec, second)
        self._random = np.random.default_rng((seed, bucket.index))
        self._rank, self._device = codec.rank, device
        self.p, self.q = (
            torch.zeros(b.numel if b is not None else 0, dtype=bucket.dtype, device=device)
            for b in (self.first, self.second)
        )
        """Means of the factors, as all members have them."""
        self._own_p, self._own_q = torch.zeros_like(self.p), torch.zeros_like(self.q)
        self._num_projected = 0

    def project(self, y: torch.Tensor) -> torch.Tensor:
        """The first bucket's values ``P_i = Q y^T`` of this member's gradient ``y`` (n,)."""
        self._num_projected += 1
        self._start_from_means()
        for m in self._matrices:
            torch.mm(self._of(self._own_q, m.second), y[m.whole].view(m.shape).t(), out=self._of(self._own_p, m.first))
        for whole, first in self._kept:
            self._own_p[first] = y[whole]
        return self._own_p

    def orthonormalise(self) -> None:
        """The first bucket's means have come: the rows of every ``P`` become orthonormal."""
        for m in self._matrices:
            orthonormalise(self._of(self.p, m.first))

    def project_back(self, y: torch.Tensor) -> torch.Tensor:
        """The second bucket's values ``Q_i = P y`` of this member's gradient (n,)."""
        for m in self._matrices:
            torch.mm(self._of(self.p, m.first), y[m.whole].view(m.shape), out=self._of(self._own_q, m.second))
        return self._own_q

    def leave(self, y: torch.Tensor, weight: float) -> None:
        """``y = (y - P^T Q_i) / W``, in place: what this member has not sent."""
        for m in self._matrices:
            p, q = self._of(self.p, m.first), self._of(self._own_q, m.second)
            subtract_product(p, q, 1 / weight, y[m.whole].view(m.shape))
        for whole, _ in self._kept:
            y[whole].zero_()

    def multiply(self, out: torch.Tensor) -> None:
        """The mean ``P^T Q`` (n,), the same bits on all members. Good until the next step's first factors come."""
        there = out if out.device == self._device else torch.empty_like(out, device=self._device)
        for m in self._matrices:
            multiply(self._of(self.p, m.first), self._of(self.q, m.second), there[m.whole].view(m.shape))
        for whole, first in self._kept:
            there[whole] = self.p[first]
        if there is not out:
            out.copy_(there)

    def _of(self, flat: torch.Tensor, place: slice) -> torch.Tensor:
        return flat[place].view(self._rank, -1)

    @property
    def is_warm(self) -> bool:
        """Whether the iteration has left its random start behind."""
        return self._num_projected > 2

    def _start_from_means(self) -> None:
        """Rows of ``Q`` that are nothing, or not finite, would stay so. ``q`` itself stays as it is: who has the last
        step's sums may yet be asked for them."""
        self._own_q.copy_(self.q)
        for m in self._matrices:
            q = self._of(self._own_q, m.second)
            norms = torch.linalg.vector_norm(q.double(), dim=1)
            for k in torch.nonzero(~((norms > 0) & (norms < torch.inf))).flatten().tolist():
                q[k] = torch.from_numpy(self._random.standard_normal(q.shape[1])).to(q)


def factors_of(record: Record, codec: Codec, layout: Layout, device: torch.device) -> dict[int, Factors]:
    """By bucket, if a generation's members use ``lowrank``. Second buckets are counted on behind the layout's."""
    if not isinstance(codec, LowRank):
        return {}
    assert len(set(record.codecs)) == 1, f"codecs {record.codecs}: low rank is used by all members or by none"
    found: dict[int, Factors] = {}
    second = len(layout.buckets)
    for bucket in layout.buckets:
        if not bucket.is_dense:
            found[bucket.index] = Factors(bucket, codec, second=second, seed=record.number, device=device)
            second += found[bucket.index].second is not None
    return found


def _factor_buckets(
    bucket: Bucket, codec: LowRank, second: int
) -> tuple[Bucket, Bucket | None, list[_Matrix], list[tuple[slice, slice]]]:
    firsts: list[Segment] = []
    seconds: list[Segment] = []
    matrices, kept, p, q = [], [], 0, 0
    for s in bucket.segments:
        shape, whole = codec.matrix(s.shape), slice(s.offset, s.stop)
        if shape is None:
            firsts.append(Segment(s.name, s.shape, p, s.numel))
            kept.append((whole, slice(p, firsts[-1].stop)))
        else:
            rows, cols = shape
            firsts.append(Segment(s.name, (codec.rank, rows), p, codec.rank * rows))
            seconds.append(Segment(s.name, (codec.rank, cols), q, codec.rank * cols))
            matrices.append(_Matrix(whole, shape, slice(p, firsts[-1].stop), slice(q, seconds[-1].stop)))
            q = seconds[-1].stop
        p = firsts[-1].stop
    first = Bucket(bucket.index, bucket.dtype, tuple(firsts), is_dense=True)
    following = Bucket(second, bucket.dtype, tuple(seconds), is_dense=True) if seconds else None
    return first, following, matrices, kept
