"""From what workers take for their steps to the table that all of them follow: scores, shares, learning-rate scales."""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from raytrain_het.allocation.batch_shares import StepCost, apportion, balanced_shares, proportional_shares, slowest_s
from raytrain_het.allocation.learning_rate import lr_scales, normalised_scores
from raytrain_het.fleet.profile import Profile
from raytrain_het.fleet.scores import Policy
from raytrain_het.fleet.scores import scores as scores_by
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
    predicted_step_s: float | None
    """A whole step's time; None where only the hardware is known, and without messages in a run's first table."""
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
        policy: how a profile becomes a score (:mod:`raytrain_het.fleet.scores`). With ``train_step`` shares balance the
            step times; with any other they are in proportion to the scores.
    """

    def __init__(
        self, *, alpha: float = 0.0, balance: bool = True, spares: bool = False, policy: str | Policy = "train_step"
    ) -> None:
        self.alpha, self.balance, self.spares, self.policy = alpha, balance, spares, policy
        self.table: Table | None = None
        self.global_batch_size = 0
        self._profiles: dict[int, Profile] = {}
        self._models: dict[int, StepTimeModel] = {}
        self._fresh: dict[int, int] = {}
        """Observations by slot since the table in force."""
        self._cycles: deque[float] = deque(maxlen=20)

    def introduce(self, slot: int, profile: Profile) -> None:
        """A worker has come, with what is known of its hardware, and perhaps of this model's step on it.

        What was learnt in its slot stays, if it runs on the same hardware as its predecessor.
        """
        before = self._profiles.get(slot)
        self._profiles[slot] = profile
        if before is not None and (before.hardware, before.cores) == (profile.hardware, profile.cores):
            return
        self._models.pop(slot, None)
        if profile.step is not None:
            self._models[slot] = StepTimeModel(profile.step)

    def first(self, slots: Iterable[int]) -> Table | None:
        """What the run starts with: from kept step times if there are any of all workers, else from the hardware.

        Raises:
            ConfigError, ValueError: the policy needs what was not measured, or its scores are none.
        """
        slots = sorted(slots)
        if not (self.balance or self.alpha) or any(s not in self._profiles for s in slots) or self._too_small(slots):
            return None
        costs = [self.cost(slot) for slot in slots]
        known = [c for c in costs if c is not None]
        predicted = None
        if self.policy != "train_step":
            scores, reason = scores_by({s: self._profiles[s] for s in slots}, self.policy), "from the score policy"
        elif len(known) == len(costs):
            scores, reason = self.scores(slots), "from step times of earlier runs"
        else:
            scores, reason = scores_by({s: self._profiles[s] for s in slots}, "flops"), "from the hardware"
        if not self.balance:
            shares = apportion(self.global_batch_size, [1.0] * len(slots))
        elif self.policy == "train_step" and len(known) == len(costs):
            shares = balanced_shares(known, self.global_batch_size)
            predicted = slowest_s(known, shares)
        else:
            shares = proportional_shares([scores[slot] for slot in slots], self.global_batch_size)
        self.table = Table(
            version=self.table.version + 1 if self.table is not None else 1, scores=scores,
            lr_scales=lr_scales(scores, self.alpha), shares=dict(zip(slots, shares, strict=True)),
            predicted_step_s=predicted, reason=reason,
        )  # fmt: skip
        return self.table

    def _too_small(self, slots: list[int]) -> bool:
        return self.global_batch_size < len(slots)

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

    @property
    def predicted_samples_per_s(self) -> float | None:
        """What the table in force has promised."""
        predicted = self.table.predicted_step_s if self.table is not None else None
        return self.global_batch_size / predicted if predicted else None

    def better(self, slots: Iterable[int], shares: dict[int, int]) -> Table | None:
        """A table that is worth a change; None if there is none.

        Args:
            slots: who takes part.
            shares: samples of a full global batch that each has now.
        """
        slots = sorted(slots)
        if self.policy != "train_step":
            known_as = set(self.table.scores) if self.table is not None else set()
            return self.first(slots) if not known_as >= set(slots) else None
        costs = [self.cost(slot) for slot in slots]
        known = [c for c in costs if c is not None]
        # A spare does no steps: what is known of it is from before.
        seen = min((self._fresh.get(slot, 0) for slot in slots if shares.get(slot, 0) > 0), default=0)
        if len(known) < len(costs) or seen < NUM_NEEDED or self._too_small(slots):
            return None
        now = [shares.get(slot, 0) for slot in slots]
        best = (
            balanced_shares(known, self.global_batch_size, minimum=0 if self.spares else None) if self.balance else now
        )
        before, after = slowest_s(known, now), slowest_s(known, best)
        # What a step takes besides its slowest worker (the way of the messages, chance) stays whatever the shares.
        besides = max(0.0, statistics.median(self._cycles) - before) if self._cycles else 0.0
        before, after = before + besides, after + besides
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

    def scores(self, slots: Collection[int]) -> dict[int, float]:
        """``p_i`` of those that have been seen, with mean 1."""
        if self.policy != "train_step":
            return {slot: p for slot, p in self.table.scores.items() if slot in slots} if self.table else {}
        costs = {slot: cost for slot in slots if (cost := self.cost(slot)) is not None}
        equal = self.global_batch_size / max(len(costs), 1)
        return normalised_scores({slot: equal / cost.step_s(equal) for slot, cost in costs.items()})

    def _scores_moved(self, scores: dict[int, float]) -> bool:
        assert self.table is not None
        old = self.table.scores
        return scores.keys() != old.keys() or any(abs(scores[s] / old[s] - 1) > 0.1 for s in scores)
