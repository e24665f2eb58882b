"""``lowrank``: each matrix of the gradient as the product of two thin ones (PowerSGD, Vogels et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from raytrain_het.allreduce.codecs.base import RESIDUAL, State
from raytrain_het.allreduce.codecs.compiled import array, kernels, loops_for
from raytrain_het.allreduce.codecs.dense import NoCodec

LEAST = 1e-6
"""A row of a factor of which no larger part is left, without those before it, is rounding errors."""


class LowRank(NoCodec):
    """A matrix ``M`` (rows, cols) as ``P^T Q`` with ``P`` (r, rows) and ``Q`` (r, cols), with error feedback.

    What travels is linear in the gradients, so it is no encoding of one worker's: all members add up ``P_i = Q M_i^T``,
    make the rows of the sum orthonormal, and add up ``Q_i = P M_i``. That is one step of the power iteration, which
    goes on from the last step's ``Q``. The factors themselves, and tensors that these would not make smaller, travel
    as they are.

    ``M_i = w_i g_i + W r_i``, with the residual ``r_i' = (M_i - P^T Q_i) / W``.

    Args:
        rank: r; of a matrix for which ``r (rows + cols) >= rows cols`` all is sent.
    """

    name = "lowrank"
    spares_small = True
    biased = True

    def __init__(self, rank: int = 4) -> None:
        self.rank = rank

    def init(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> State:
        return {RESIDUAL: torch.zeros(num_elements, dtype=dtype, device=device)}

    def prepare(self) -> None:
        kernels()

    def matrix(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """(rows, cols) of a tensor seen as a matrix, its first dimension by all others; None if it travels whole."""
        rows, cols = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        return (rows, cols) if self.rank * (rows + cols) < rows * cols else None

    def num_travelling(self, shape: Sequence[int]) -> int:
        """Elements of a tensor's factors, or its own."""
        matrix = self.matrix(shape)
        return self.rank * sum(matrix) if matrix is not None else math.prod(shape)


def orthonormalise(p: torch.Tensor) -> None:
    """Make the rows of ``p`` (r, n) orthonormal, in place and to the same bits on every machine; what depends on those
    before becomes zeros."""
    loops = loops_for(p)
    if loops is not None:
        loops.orthonormalise(array(p), np.empty(p.shape), LEAST)
        return
    rows = p.detach().cpu().numpy().astype(np.float64)
    for k, row in enumerate(rows):
        before = _sum(row * row)
        for _ in range(2):
            for other in rows[:k]:
                row -= _sum(row * other) * other
        after = _sum(row * row)
        rows[k] = row * (1.0 / np.sqrt(after)) if after > LEAST * LEAST * before else 0.0
    p.copy_(torch.from_numpy(rows))


def _sum(values: Any) -> Any:
    """One after the other: numpy's own sum takes them in another order on another CPU."""
    return np.cumsum(values)[-1]


def multiply(p: torch.Tensor, q: torch.Tensor, out: torch.Tensor) -> None:
    """``out = p^T q`` of (r, rows) and (r, cols), to the same bits on every machine."""
    loops = loops_for(out)
    if loops is not None:
        loops.multiply(array(p), array(q), array(out))
        return
    torch.mul(p[0].unsqueeze(1), q[0], out=out)
    for left, right in zip(p[1:], q[1:], strict=True):
        out.add_(left.unsqueeze(1) * right)  # No product and sum in one: that is rounded otherwise.


def leave(p: torch.Tensor, q: torch.Tensor, factor: float, y: torch.Tensor) -> None:
    """``y = factor (y - p^T q)`` of (r, rows), (r, cols) and (rows, cols), in place."""
    loops = loops_for(y)
    if loops is not None:
        loops.leave(array(p), array(q), factor, array(y))
    else:
        y.addmm_(p.t(), q, beta=factor, alpha=-factor)
