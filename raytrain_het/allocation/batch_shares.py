"""How many samples of a global batch each worker takes."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
