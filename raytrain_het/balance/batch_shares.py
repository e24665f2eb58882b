"""How many samples of a global batch each worker takes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
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


LEAST = 2
"""The least share: a batch norm over a single sample raises."""


def least_share(total: int, count: int) -> int:
    """The least share of each of ``count`` workers: :data:`LEAST` if ``total`` has as many for all, else 1."""
    return LEAST if total >= LEAST * count else 1


def balanced_shares(costs: Sequence[StepCost], total: int, *, minimum: int | None = None) -> list[int]:
    """Whole shares that sum to ``total``, with the least time of the slowest worker.

    Solves ``sum_i max(minimum, (T - c_i) / k_i) = total`` for ``T`` by bisection, rounds down, and gives each sample
    that remains to the worker whose ``t_i(b_i + 1)`` is least.

    Args:
        costs: one per worker, ``per_sample_s`` above 0.
        total: samples of the global batch.
        minimum: the least a worker gets; default is :func:`least_share`. 0 where spares are wanted: each then gets none
            or two at least, whichever makes the slowest faster.

    Raises:
        ValueError: ``total`` is less than ``minimum`` for each worker, or a cost is negative, zero or not finite.
    """
    least = least_share(total, len(costs)) if minimum is None else minimum
    if total < least * len(costs) or not costs:
        raise ValueError(f"total={total} cannot give {len(costs)} workers {least} each: lower minimum.")
    for index, cost in enumerate(costs):
        if not (math.isfinite(cost.fixed_s) and cost.fixed_s >= 0 and 0 < cost.per_sample_s < math.inf):
            raise ValueError(f"costs[{index}]={cost!r} is not valid: fixed_s from 0 and per_sample_s above 0, finite.")
    bounds = dict.fromkeys(range(len(costs)), least)
    shares = _balanced(costs, total, bounds)
    while least == 0 and total >= LEAST and 1 in shares:
        index = shares.index(1)
        without, with_two = {i: low for i, low in bounds.items() if i != index}, bounds | {index: LEAST}
        ways = [(low, _balanced(costs, total, low)) for low in (without, with_two) if sum(low.values()) <= total]
        bounds, shares = min(ways, key=lambda way: slowest_s(costs, way[1]))
    return shares


def proportional_shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares that sum to ``total``, in proportion to ``weights`` (above 0), but :func:`least_share` at least.

    Raises:
        ValueError: ``total`` is less than one for each, or a weight is not a number above 0.
    """
    return balanced_shares([StepCost(0.0, 1 / w if w > 0 else 0.0) for w in weights], total)


def _balanced(costs: Sequence[StepCost], total: int, least: Mapping[int, int]) -> list[int]:
    """The same for those workers that are in ``least``, with a least share for each; the others get nothing."""

    def samples_within(limit_s: float) -> dict[int, float]:
        return {i: max(float(low), (limit_s - costs[i].fixed_s) / costs[i].per_sample_s) for i, low in least.items()}

    low, high = 0.0, max(costs[i].step_s(total) for i in least)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(samples_within(middle).values()) > total else (middle, high)
    shares = [0] * len(costs)
    for i, samples in samples_within(low).items():
        shares[i] = max(least[i], math.floor(samples))
    ahead = [(costs[i].step_s(shares[i] + 1), i) for i in least]
    heapq.heapify(ahead)
    for _ in range(total - sum(shares)):
        _, i = heapq.heappop(ahead)
        shares[i] += 1
        heapq.heappush(ahead, (costs[i].step_s(shares[i] + 1), i))
    return shares


def slowest_s(costs: Sequence[StepCost], shares: Sequence[int]) -> float:
    """The time of the slowest worker that has samples, seconds."""
    return max((c.step_s(b) for c, b in zip(costs, shares, strict=True) if b > 0), default=0.0)
