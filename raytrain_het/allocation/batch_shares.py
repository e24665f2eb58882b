"""How many samples of a global batch each worker takes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split ``total`` into whole numbers in proportion to ``weights`` (largest remainder).

    With quota ``q_i = total * w_i / sum(w)``, everyone gets ``floor(q_i)`` and what remains goes, one each, to the
    largest ``q_i - floor(q_i)``; ties go to the lower index. The arithmetic is exact (whole numbers, no rounding), so
    every machine computes the same split, and multiplying all weights by a power of two changes nothing.

    Args:
        total: what is split, from 0.
        weights: one finite number from 0 per receiver, at least one above 0. They need not sum to 1.

    Returns:
        One count per weight, summing to ``total``. A weight of 0 gets 0; with fewer units than positive weights some
        of those get 0 too.

    Raises:
        ValueError: ``total`` is negative, there are no weights, a weight is negative or not finite, or all are 0.

    Example:
        >>> apportion(512, [4, 2, 1, 1])
        [256, 128, 64, 64]
        >>> apportion(5, [1, 1, 0])
        [3, 2, 0]
    """
    if total < 0:
        raise ValueError(f"total={total!r} cannot be split: it must be a whole number from 0.")
    if len(weights) == 0:
        raise ValueError("weights=[] has nobody to split among: give one number per worker.")
    for index, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weights[{index}]={weight!r} is not valid: a weight is a finite number from 0.")

    # A float is a fraction over a power of two: over the common denominator all that follows is in whole numbers.
    ratios = [weight.as_integer_ratio() for weight in weights]
    denominator = math.lcm(*(d for _, d in ratios))
    numerators = [n * (denominator // d) for n, d in ratios]
    whole = sum(numerators)
    if whole == 0:
        raise ValueError(f"weights={list(weights)!r} are all 0: at least one must be above 0.")

    counts, remainders = map(list, zip(*(divmod(total * n, whole) for n in numerators), strict=True))
    # The remainders sum to `left * whole` and each is below `whole`, so more than `left` of them are above 0 (or left
    # is 0): a weight of 0 never receives one of these units.
    left = total - sum(counts)
    for index in sorted(range(len(counts)), key=lambda i: (-remainders[i], i))[:left]:
        counts[index] += 1
    return counts


@dataclass(frozen=True)
class StepCost:
    """A worker's time for a step with ``b`` samples: ``t(b) = fixed_s + per_sample_s * b``, in seconds."""

    fixed_s: float
    per_sample_s: float

    def step_s(self, samples: float) -> float:
        """``t(samples)``."""
        return self.fixed_s + self.per_sample_s * samples


def balanced_shares(costs: Sequence[StepCost], total: int, *, minimum: int = 1) -> list[int]:
    """Whole shares that sum to ``total``, with the least time of the slowest worker.

    Solves ``sum_i max(minimum, (T - c_i) / k_i) = total`` for ``T`` by bisection, rounds down, and gives each sample
    that remains to the worker whose ``t_i(b_i + 1)`` is least.

    Args:
        costs: one per worker, ``per_sample_s`` above 0.
        total: samples of the global batch.
        minimum: the least a worker gets; 0 where there are more workers than samples, or spares are wanted.

    Raises:
        ValueError: ``total`` is less than ``minimum`` for each worker, or a cost is negative, zero or not finite.
    """
    if total < minimum * len(costs) or not costs:
        raise ValueError(f"total={total} cannot give {len(costs)} workers {minimum} each: lower minimum.")
    for index, cost in enumerate(costs):
        if not (math.isfinite(cost.fixed_s) and cost.fixed_s >= 0 and 0 < cost.per_sample_s < math.inf):
            raise ValueError(f"costs[{index}]={cost!r} is not valid: fixed_s from 0 and per_sample_s above 0, finite.")

    def samples_within(limit_s: float) -> list[float]:
        return [max(float(minimum), (limit_s - c.fixed_s) / c.per_sample_s) for c in costs]

    low, high = 0.0, max(c.step_s(total) for c in costs)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(samples_within(middle)) > total else (middle, high)
    shares = [max(minimum, math.floor(x)) for x in samples_within(low)]
    ahead = [(cost.step_s(shares[i] + 1), i) for i, cost in enumerate(costs)]
    heapq.heapify(ahead)
    for _ in range(total - sum(shares)):
        _, i = heapq.heappop(ahead)
        shares[i] += 1
        heapq.heappush(ahead, (costs[i].step_s(shares[i] + 1), i))
    return shares


def slowest_s(costs: Sequence[StepCost], shares: Sequence[int]) -> float:
    """The time of the slowest worker that has samples, seconds."""
    return max((c.step_s(b) for c, b in zip(costs, shares, strict=True) if b > 0), default=0.0)
