"""Learning-rate scales of unequal workers: ``eta_i = eta * r_i`` with ``r_i = p_i^-alpha``.

In synchronous training replicas must not diverge, so ``r_i`` weighs worker ``i``'s gradient instead:
``g = sum_i b_i r_i g_i / sum_i b_i r_i``. A common factor in ``r`` cancels, and the overall rate stays ``eta``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MOST = 2.0**30
"""Scales are from 1 over this to this: single precision does not see a weight beside one that is so much larger."""


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


def lr_scales(scores: Mapping[int, float], alpha: float) -> dict[int, float]:
    """``r_i = p_i^-alpha`` by worker, with scores of mean 1. ``alpha`` 0 gives 1 for all.

    Raises:
        ValueError: ``alpha`` is not finite, or a score is no finite number above 0, or a scale is beyond ``MOST``.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha!r} is not valid: allowed is a finite number. Write alpha=0.0 for the mean.")
    return {worker: _scale(worker, score, alpha) for worker, score in normalised_scores(scores).items()}


def _scale(worker: int, score: float, alpha: float) -> float:
    try:
        scale = score**-alpha
    except OverflowError:
        scale = math.inf
    if not 1 / MOST <= scale <= MOST:
        raise ValueError(
            f"alpha={alpha!r} is not valid for worker {worker}: with its score of {score:.4g} its learning-rate scale "
            f"score^-alpha is {scale:.4g}, and allowed is {1 / MOST:.2g} to {MOST:.2g}, since gradients are summed in "
            "single precision. Write an alpha nearer to 0; 1.0 counts every worker the same."
        )
    return scale


def effective_batch_size(batch_shares: Sequence[float], scales: Sequence[float], *, normalised: bool = True) -> float:
    """``B_eff = (sum w)^2 / sum(w^2 / b)``: the samples that, equally weighted, would give the same variance.

    With ``w_i = b_i r_i`` it is equal to ``sum b`` if and only if all scales of workers with samples are the same.
    Workers without samples do not count.

    Args:
        batch_shares: ``b_i``.
        scales: ``r_i``.
        normalised: false for the literal sum of the workers' means, where ``w_i = r_i``.
    """
    weights = [(b * r if normalised else r, b) for b, r in zip(batch_shares, scales, strict=True) if b > 0]
    most = max((w for w, _ in weights), default=0.0)
    if most == 0:
        return 0.0
    # A common factor cancels: with it, no square overflows.
    return sum(w / most for w, _ in weights) ** 2 / sum((w / most) ** 2 / b for w, b in weights)
