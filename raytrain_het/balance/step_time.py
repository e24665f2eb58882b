"""A worker's step time as a function of its share, learnt from the steps it does anyway."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from raytrain_het.balance.batch_shares import StepCost

WINDOW = 32
"""The last so many observations count."""
NUM_FOR_CHANGE = 3
"""If so many observations in a row are off in the same direction, the speed has changed: it is no noise."""
CHANGE = 0.2
"""They must be off by a fifth."""
MAX_SLOPE_ERROR = 0.15
"""A fitted slope counts if twice its standard error is less than this part of it."""
USUAL_NOISE = 0.1
"""Relative deviation that is taken for granted before there are observations enough to tell."""

Observation = tuple[int, float]


class StepTimeModel:
    """Robust estimate of ``t(b) = c + k b`` from observations ``(b, t)``, as ``k (b + x)`` with ``x = c / k``.

    ``x`` comes from a least-squares line through the medians by batch size, where the sizes differ enough for the
    noise there is; until then it stays what it was, at first 0. ``k`` is the median of ``t / (b + x)``. Some
    observations in a row that are all off by a fifth say that the machine has changed: what came before them is
    forgotten, and ``x`` stays.
    """

    def __init__(self, kept: StepCost | None = None) -> None:
        self._kept = kept
        """From an earlier run. It counts until there is an observation, its fixed part for longer."""
        self._seen: list[Observation] = []
        self._samples_worth = kept.fixed_s / kept.per_sample_s if kept is not None else 0.0
        """``x``: so many samples would take as long as what does not depend on the share."""

    @property
    def cost(self) -> StepCost | None:
        """The estimate; None where nothing is known."""
        if not self._seen:
            return self._kept
        k = self._per_sample(self._seen)
        return StepCost(k * self._samples_worth, k)

    def usual_s(self, samples: int) -> float | None:
        """The median of what so many samples have taken; None where that was seen too rarely."""
        seen = [t for b, t in self._seen if b == samples]
        return statistics.median(seen) if len(seen) >= NUM_FOR_CHANGE else None

    def scale(self, factor: float) -> None:
        """From now on all that was observed, or kept, counts as so many times as long."""
        self._seen = [(b, factor * t) for b, t in self._seen]
        if self._kept is not None:
            self._kept = StepCost(factor * self._kept.fixed_s, factor * self._kept.per_sample_s)

    @property
    def uncertainty(self) -> float:
        """Relative standard error of the estimated time.

        ``1.25 s / sqrt(n)``, as of a median, with ``s`` 1.48 times the median absolute deviation; or the same of the
        medians of four consecutive blocks, if that is more: a machine may be slower for seconds on end, and then
        neighbours say little that is new.
        """
        count = len(self._seen)
        if count < 2 * NUM_FOR_CHANGE:
            return 1.25 * USUAL_NOISE / math.sqrt(max(count, 1))
        k = self._per_sample(self._seen)
        off = [t / (k * (b + self._samples_worth)) - 1 for b, t in self._seen]
        alone = 1.25 * 1.48 * statistics.median(map(abs, off)) / math.sqrt(count)
        if count < 4 * NUM_FOR_CHANGE:
            return alone
        blocks = [statistics.median(off[i * count // 4 : (i + 1) * count // 4]) for i in range(4)]
        return max(alone, statistics.stdev(blocks) / 2)

    def observe(self, samples: int, seconds: float) -> None:
        """One step with ``samples`` > 0 took ``seconds`` > 0."""
        latest = [*self._seen[-NUM_FOR_CHANGE + 1 :], (samples, seconds)]
        before = self._seen[: -NUM_FOR_CHANGE + 1]
        self._seen = [*self._seen[-WINDOW + 1 :], (samples, seconds)]
        if before and len(latest) == NUM_FOR_CHANGE:
            k = self._per_sample(before)
            ratios = [t / (k * (b + self._samples_worth)) for b, t in latest]
            if min(ratios) > 1 + CHANGE or max(ratios) < 1 / (1 + CHANGE):
                self._seen = latest
        self._learn_fixed_part()

    def _per_sample(self, seen: Sequence[Observation]) -> float:
        return statistics.median(t / (b + self._samples_worth) for b, t in seen)

    def _learn_fixed_part(self) -> None:
        times: dict[int, list[float]] = {}
        for b, t in self._seen:
            times.setdefault(b, []).append(t)
        if len(times) < 2 or min(map(len, times.values())) < 2 < len(self._seen) / len(times):
            return
        points = [(b, statistics.median(ts), len(ts)) for b, ts in times.items()]
        whole = len(self._seen)
        mean_b = sum(b * n for b, _, n in points) / whole
        mean_t = sum(t * n for _, t, n in points) / whole
        square = sum(n * (b - mean_b) ** 2 for b, _, n in points)
        slope = sum(n * (b - mean_b) * (t - mean_t) for b, t, n in points) / square
        noise = statistics.median(abs(t - statistics.median(times[b])) for b, t in self._seen)
        if slope > 0 and 2 * 1.48 * noise / math.sqrt(square) < MAX_SLOPE_ERROR * slope:
            self._samples_worth = max(0.0, mean_t / slope - mean_b)
