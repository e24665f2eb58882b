"""From what workers take for their steps to the table that all of them follow: scores, shares, learning-rate scales."""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from raytrain_het.allocation.batch_shares import StepCost, balanced_shares, slowest_s
from raytrain_het.allocation.learning_rate import lr_scales, normalised_scores
from raytrain_het.fleet.step_time import StepTimeModel

MIN_GAIN = 0.02
"""A new table has to promise a step that is shorter by this part, and by as much as the estimates may be off."""
NUM_NEEDED = 3
"""So many steps of every worker are seen before shares follow from them, after each change."""


@dataclass(frozen=True)
class Table:
    """What all workers follow. By slot."""

    version: int
    scores: dict[int, float]
    """``p_i``, samples per second at an equal share, scaled to mean 1."""
    lr_scales: dict[int, float]
    shares: dict[int, int]
    """Samples of a full global batch."""
    predicted_step_s: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that survives JSON."""
        return dataclasses.asdict(self)


class Scoreboard:
    """Pure bookkeeping: observations in, tables out.

    Args:
        alpha: exponent of the learning-rate scale ``p_i^-alpha``.
        balance: whether shares follow the measured speeds; else only scores come from here.
        spares: whether a worker that costs more than it gives may be held at a share of 0.
    """

    def __init__(self, *, alpha: float = 0.0, balance: bool = True, spares: bool = False) -> None:
        self.alpha, self.balance, self.spares = alpha, balance, spares
        self.table: Table | None = None
        self.global_batch_size = 0
        self._models: dict[int, StepTimeModel] = {}
        self._fresh: dict[int, int] = {}
        """Observations by slot since the table in force."""
        self._cycles: deque[float] = deque(maxlen=20)

    def observe(self, slot: int, samples: int, seconds: float, cycle_s: float | None = None) -> None:
        """A worker's step: its samples, its time without what it waited for others, and with that."""
        if cycle_s is not None:
            self._cycles.append(cycle_s)
        if samples > 0 and seconds > 0:
            self._models.setdefault(slot, StepTimeModel()).observe(samples, seconds)
            self._fresh[slot] = self._fresh.get(slot, 0) + 1

    def cost(self, slot: int) -> StepCost | None:
        """What is known of a worker's step time."""
        model = self._models.get(slot)
        return model.cost if model is not None else None

    def solo_samples_per_s(self, slot: int, samples: int) -> float | None:
        """What a worker would do by itself with such a batch, ``b / t(b)``."""
        cost = self.cost(slot)
        return samples / cost.step_s(samples) if cost is not None and samples > 0 else None

    @property
    def samples_per_s(self) -> float | None:
        """What all do together: the global batch over the median of the last steps' durations."""
        return self.global_batch_size / statistics.median(self._cycles) if self._cycles else None

    def better(self, slots: Iterable[int], shares: dict[int, int]) -> Table | None:
        """A table that is worth a change; None if there is none.

        Args:
            slots: who takes part.
            shares: samples of a full global batch that each has now.
        """
        slots = sorted(slots)
        costs = [self.cost(slot) for slot in slots]
        known = [c for c in costs if c is not None]
        # A spare does no steps: what is known of it is from before.
        seen = min((self._fresh.get(slot, 0) for slot in slots if shares.get(slot, 0) > 0), default=0)
        if len(known) < len(costs) or seen < NUM_NEEDED or self.global_batch_size < len(slots):
            return None
        now = [shares.get(slot, 0) for slot in slots]
        best = balanced_shares(known, self.global_batch_size, minimum=int(not self.spares)) if self.balance else now
        before, after = slowest_s(known, now), slowest_s(known, best)
        scores = self.scores(slots)
        first = self.alpha != 0 and (self.table is None or self._scores_moved(scores))
        unsure = max(self._models[slot].uncertainty for slot in slots)
        worth_it = after < (1 - MIN_GAIN - unsure) * before
        if not worth_it and not first:
            return None
        if not worth_it:
            best, reason = now, "scores are known now" if self.table is None else "scores have changed"
        else:
            reason = f"a step of {1000 * before:.4g} ms becomes one of {1000 * after:.4g} ms"
            spares = [str(slot) for slot, b in zip(slots, best, strict=True) if b == 0]
            if spares:
                reason += f"; worker {', '.join(spares)} costs more than it gives, and is a warm spare"
        version = self.table.version + 1 if self.table is not None else 1
        self._fresh.clear()
        self.table = Table(
            version=version, scores=scores, lr_scales=lr_scales(scores, self.alpha),
            shares=dict(zip(slots, best, strict=True)), predicted_step_s=min(before, after), reason=reason,
        )  # fmt: skip
        return self.table

    def scores(self, slots: Iterable[int]) -> dict[int, float]:
        """``p_i`` of those that have been seen, with mean 1."""
        costs = {slot: cost for slot in slots if (cost := self.cost(slot)) is not None}
        equal = self.global_batch_size / max(len(costs), 1)
        return normalised_scores({slot: equal / cost.step_s(equal) for slot, cost in costs.items()})

    def _scores_moved(self, scores: dict[int, float]) -> bool:
        assert self.table is not None
        old = self.table.scores
        return scores.keys() != old.keys() or any(abs(scores[s] / old[s] - 1) > 0.1 for s in scores)
