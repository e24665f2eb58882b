"""Low rank: a bucket whose matrices travel as two thin factors (codec ``lowrank``).

The factors are linear in the gradients, so they are added up as they are, by another reducer: first ``P`` of every
matrix, and then ``Q``, which depends on the sum of the first. The mean of the gradients is ``P^T Q``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch

from raytrain_het.allreduce.codecs import RESIDUAL
from raytrain_het.allreduce.codecs.lowrank import LowRank, multiply, orthonormalise, subtract_product
from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Bucket, Segment
from raytrain_het.allreduce.reducers.base import BucketReducer, SendBuffer
from raytrain_het.allreduce.reducers.gradient_coder import GradientCoder
from raytrain_het.allreduce.transport.group import Operation


class LowRankReducer:
    """See the module's text, and :class:`~raytrain_het.allreduce.reducers.base.BucketReducer`.

    Args:
        bucket: which one.
        factors: its matrices' factors.
        reducer_of: makes the reducer that adds up a bucket of factors.
        coder: has this member's residual.
    """

    def __init__(
        self,
        bucket: Bucket,
        factors: MatrixFactors,
        reducer_of: Callable[[Bucket], BucketReducer],
        coder: GradientCoder,
    ) -> None:
        self._bucket, self.factors, self._coder = bucket, factors, coder
        self._first = reducer_of(factors.first)
        self._second = reducer_of(factors.second) if factors.second is not None else None

    @property
    def owned(self) -> tuple[int, int]:
        return 0, 0

    @property
    def gradient_bytes(self) -> int:
        return self._first.gradient_bytes + (self._second.gradient_bytes if self._second is not None else 0)

    def send_buffers(self) -> list[SendBuffer] | None:
        return None

    def expect_step(self) -> None:
        self._first.expect_step()
        if self._second is not None:
            self._second.expect_step()

    def all_reduce(
        self, header: Header, local: torch.Tensor | None, weight: float
    ) -> Generator[Operation, None, Header]:
        factors, second = self.factors, self._second
        y = self._corrected(header, local, weight)
        operations = self._first.all_reduce(header, factors.project(y) if y is not None else None, weight)
        sent = next(operations)
        if second is None:  # All has been sent: others may commit the step, and this member may take it over.
            self._keep_residual(y, header.step, weight)
        yield sent
        of_all = yield from operations
        self._first.decode(factors.p)
        if second is None:
            return of_all
        factors.orthonormalise()
        again = header._replace(bucket=factors.second_index, used=0)
        operations = second.all_reduce(again, factors.project_back(y) if y is not None else None, weight)
        sent = next(operations)
        self._keep_residual(y, header.step, weight)  # While that is on its way.
        yield sent
        yield from operations
        second.decode(factors.q)
        return of_all

    def _corrected(self, header: Header, local: torch.Tensor | None, weight: float) -> torch.Tensor | None:
        """``y = w g + W r`` (n,), in the memory of the next residual; None if this member contributes nothing."""
        bucket, feedback = self._bucket, self._coder.feedback
        if local is None or not header.contributes:
            feedback.carry_over(bucket, 0, bucket.numel, header.step)
            return None
        kept, following = feedback.of_shard(bucket, 0, bucket.numel, header.step)
        local = local.to(self._coder.members.device)
        return torch.add(local, kept[RESIDUAL], alpha=weight, out=following[RESIDUAL])

    def _keep_residual(self, y: torch.Tensor | None, step: int, weight: float) -> None:
        """Make ``y`` the next residual: what the factors lack of it."""
        if y is None:
            return
        due = self.factors.is_warm and self._coder.measures_error(self._bucket, step)
        norm = float(torch.linalg.vector_norm(y)) if due else 0.0
        self.factors.subtract_sent(y, weight)
        if norm > 0:
            self._coder.record_error(step, weight * float(torch.linalg.vector_norm(y)) / norm)

    def decode(self, out: torch.Tensor) -> None:
        self.factors.multiply(out)


@dataclass(frozen=True)
class _Matrix:
    """The place of a matrix in its bucket, and those of its factors in theirs."""

    whole: slice
    shape: tuple[int, int]
    first: slice
    second: slice


class MatrixFactors:
    """The factors of one bucket's matrices in one generation: two buckets, which travel one after the other.

    The *first* bucket holds ``P`` of every matrix, and all tensors that stay whole. The *second* holds ``Q``, and is
    None without a matrix. In a generation's first step the power iteration starts from random numbers, so a member that
    has joined or is behind has nothing to catch up with.

    Args:
        bucket: the gradient's.
        codec: says which tensors are matrices.
        second: index of the second bucket, among all that travel.
        seed: the same on all members.
        device: where the factors are.
    """

    def __init__(self, bucket: Bucket, codec: LowRank, *, second: int, seed: int, device: torch.device) -> None:
        self.first, self.second, self._matrices, self._whole = _factor_buckets(bucket, codec, second)
        self.second_index = second
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
            torch.mm(
                self._rows(self._own_q, m.second), y[m.whole].view(m.shape).t(), out=self._rows(self._own_p, m.first)
            )
        for whole, first in self._whole:
            self._own_p[first] = y[whole]
        return self._own_p

    def orthonormalise(self) -> None:
        """Make the rows of every ``P`` orthonormal, once the first bucket's means are there."""
        for m in self._matrices:
            orthonormalise(self._rows(self.p, m.first))

    def project_back(self, y: torch.Tensor) -> torch.Tensor:
        """The second bucket's values ``Q_i = P y`` of this member's gradient (n,)."""
        for m in self._matrices:
            torch.mm(self._rows(self.p, m.first), y[m.whole].view(m.shape), out=self._rows(self._own_q, m.second))
        return self._own_q

    def subtract_sent(self, y: torch.Tensor, weight: float) -> None:
        """``y = (y - P^T Q_i) / W``, in place: what this member has not sent of its gradient."""
        for m in self._matrices:
            p, q = self._rows(self.p, m.first), self._rows(self._own_q, m.second)
            subtract_product(p, q, 1 / weight, y[m.whole].view(m.shape))
        for whole, _ in self._whole:
            y[whole].zero_()

    def multiply(self, out: torch.Tensor) -> None:
        """Write the mean ``P^T Q`` into ``out`` (n,), the same bits on all members. Possible until the next step's
        first factors come."""
        there = out if out.device == self._device else torch.empty_like(out, device=self._device)
        for m in self._matrices:
            multiply(self._rows(self.p, m.first), self._rows(self.q, m.second), there[m.whole].view(m.shape))
        for whole, first in self._whole:
            there[whole] = self.p[first]
        if there is not out:
            out.copy_(there)

    def _rows(self, flat: torch.Tensor, place: slice) -> torch.Tensor:
        return flat[place].view(self._rank, -1)

    @property
    def is_warm(self) -> bool:
        """Whether the power iteration has left its random start behind."""
        return self._num_projected > 2

    def _start_from_means(self) -> None:
        """Continue the power iteration from the last step's mean ``Q``, in a copy: a peer may yet need the last step's
        sums. Rows that are 0 or not finite would stay so, and start from random numbers."""
        self._own_q.copy_(self.q)
        for m in self._matrices:
            q = self._rows(self._own_q, m.second)
            norms = torch.linalg.vector_norm(q.double(), dim=1)
            for k in torch.nonzero(~((norms > 0) & (norms < torch.inf))).flatten().tolist():
                q[k] = torch.from_numpy(self._random.standard_normal(q.shape[1])).to(q)


def _factor_buckets(
    bucket: Bucket, codec: LowRank, second: int
) -> tuple[Bucket, Bucket | None, list[_Matrix], list[tuple[slice, slice]]]:
    """The two buckets, the matrices' places, and the places of tensors that stay whole in the bucket and in the
    first one."""
    firsts: list[Segment] = []
    seconds: list[Segment] = []
    matrices, unfactored, p, q = [], [], 0, 0
    for s in bucket.segments:
        shape, whole = codec.matrix(s.shape), slice(s.offset, s.stop)
        if shape is None:
            firsts.append(Segment(s.name, s.shape, p, s.numel))
            unfactored.append((whole, slice(p, firsts[-1].stop)))
        else:
            rows, cols = shape
            firsts.append(Segment(s.name, (codec.rank, rows), p, codec.rank * rows))
            seconds.append(Segment(s.name, (codec.rank, cols), q, codec.rank * cols))
            matrices.append(_Matrix(whole, shape, slice(p, firsts[-1].stop), slice(q, seconds[-1].stop)))
            q = seconds[-1].stop
        p = firsts[-1].stop
    first = Bucket(bucket.index, bucket.dtype, tuple(firsts), is_dense=True)
    following = Bucket(second, bucket.dtype, tuple(seconds), is_dense=True) if seconds else None
    return first, following, matrices, unfactored
