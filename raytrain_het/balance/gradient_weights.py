"""Gradient weights of unequal workers: ``r_i = p_i^-alpha`` for scores ``p_i``.

A learning rate of each worker's own would be ``eta_i = eta * r_i``. In synchronous training replicas must not diverge,
so ``r_i`` weighs worker ``i``'s gradient instead: ``g = sum_i b_i r_i g_i / sum_i b_i r_i``. A common factor in ``r``
cancels, and the overall rate stays ``eta``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MOST = 2.0**30
"""Weights are from 1 over this to this: single precision does not see a weight beside one that is so much larger."""


def normalised_scores(scores: Mapping[int, float]) -> dict[int, float]:
    """Scores ``p_i`` by worker, scaled to mean 1.

    Raises:
        ValueError: a score is zero, negative or not finite; the message names the worker.
    """
    for worker, score in scores.items():
        if not math.isfinite(score) or score <= 0:
            raise ValueError(
                f"the score of worker {worker} is {score!r}: allowed are finite numbers above 0. Measure it again, or "
                "leave the worker out."
            )
    mean = sum(scores.values()) / len(scores) if scores else 1.0
    return {worker: score / mean for worker, score in scores.items()}


def gradient_weights(scores: Mapping[int, float], alpha: float) -> dict[int, float]:
    """``r_i = p_i^-alpha`` by worker, with scores of mean 1. ``alpha`` 0 gives 1 for all.

    Raises:
        ValueError: ``alpha`` is not finite, or a score is no finite number above 0, or a weight is beyond ``MOST``.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha!r} is not valid: allowed is a finite number. Write alpha=0.0 for the mean.")
    return {worker: _weight(worker, score, alpha) for worker, score in normalised_scores(scores).items()}


def _weight(worker: int, score: float, alpha: float) -> float:
    try:
        weight = score**-alpha
    except OverflowError:
        weight = math.inf
    if not 1 / MOST <= weight <= MOST:
        raise ValueError(
            f"alpha={alpha!r} is not valid for worker {worker}: with its score of {score:.4g} its gradient weight "
            f"score^-alpha is {weight:.4g}, and allowed is {1 / MOST:.2g} to {MOST:.2g}, since gradients are summed in "
            "single precision. Write an alpha nearer to 0; 1.0 counts every worker the same."
        )
    return weight


def effective_batch_size(
    batch_shares: Sequence[float], gradient_weights: Sequence[float], *, normalised: bool = True
) -> float:
    """``B_eff = (sum w)^2 / sum(w^2 / b)``: the samples that, equally weighted, would give the same variance.

    With ``w_i = b_i r_i`` it is equal to ``sum b`` if and only if all workers with samples have the same gradient
    weight. Workers without samples do not count.

    Args:
        batch_shares: ``b_i``.
        gradient_weights: ``r_i``.
        normalised: false for the literal sum of the workers' means, where ``w_i = r_i``.
    """
    weights = [(b * r if normalised else r, b) for b, r in zip(batch_shares, gradient_weights, strict=True) if b > 0]
    most = max((w for w, _ in weights), default=0.0)
    if most == 0:
        return 0.0
    # A common factor cancels: with it, no square overflows.
    return sum(w / most for w, _ in weights) ** 2 / sum((w / most) ** 2 / b for w, b in weights)
