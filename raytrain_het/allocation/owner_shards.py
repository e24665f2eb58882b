"""Who adds up which part of the gradient."""

from __future__ import annotations

from collections.abc import Sequence

STEEPNESS = 3
"""Exponent by which parts grow with speed."""
MOST = 2.0
"""No member owns more than so many times an equal part, so that its link carries at most about twice as much."""
LEAST = 0.25
"""A part of less than so many times an equal one is not worth the wait for a slow member's answer."""


def owner_parts(speeds: Sequence[float]) -> list[float]:
    """Parts by member, summing to 1: in proportion to ``p_i^3``, at most ``2/N``, and none where it would be tiny.

    Every bucket's reduction waits for its slowest owner, between two exchanges, and a slow member has the least time to
    spare. Members of equal speed own equal parts. A speed of 0 owns nothing.
    """
    equal = 1.0 / max(sum(speed > 0 for speed in speeds), 1)
    parts = _capped([speed**STEEPNESS for speed in speeds], MOST * equal)
    return _capped([part if part >= LEAST * equal else 0.0 for part in parts], MOST * equal)


def _capped(weights: Sequence[float], most: float) -> list[float]:
    """In proportion to the weights, but at most ``most`` each; if that can't be, in equal parts."""
    full: set[int] = set()
    while True:
        rest = sum(w for i, w in enumerate(weights) if i not in full)
        room = 1.0 - most * len(full)
        if rest <= 0 or room <= 0:
            count = sum(w > 0 for w in weights)
            return [1.0 / count if w > 0 else 0.0 for w in weights] if count else [0.0] * len(weights)
        parts = [most if i in full else room * w / rest for i, w in enumerate(weights)]
        over = {i for i, part in enumerate(parts) if part > most * (1 + 1e-9)}
        if not over:
            return parts
        full |= over
