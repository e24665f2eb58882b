"""What is known of the workers' speeds: from their hardware, and from what their steps take."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Mapping

from raytrain_het.balance.batch_shares import StepCost, slowest_s
from raytrain_het.balance.profile import Profile
from raytrain_het.balance.step_time import WINDOW, StepTimeModel

MOST_WAITING = 64
"""At most so many observations of a worker wait for those of the others."""
FAR = 0.05
"""A level that is so far from 1 is put into the models."""


class Speeds:
    """Pure bookkeeping, by slot.

    Workers may share a machine, a network or a file system that others keep busy. Then all of them take longer than is
    usual at their shares, or shorter again, and the least of it is the *level* of that step. Models learn from times
    divided by the level. So a few bad moments of a machine do not look like a change in every worker on it, and shares,
    which depend on ratios alone, stay. What is told outside is at the median level of the last steps. The first steps
    with new shares have no level, since every worker takes another time then: fixed parts are learnt from these.
    """

    def __init__(self) -> None:
        self.profiles: dict[int, Profile] = {}
        self.changed: set[int] = set()
        """Slots whose worker runs on other hardware than when the table in force was made."""
        self._models: dict[int, StepTimeModel] = {}
        self._num_observed: dict[int, int] = {}
        """Since the table in force."""
        self._heard: set[int] = set()
        """Slots that have told of a step in this round."""
        self._waiting: dict[int, deque[tuple[int, float]]] = {}
        """Observations (samples, seconds) of this round."""
        self._levels: deque[float] = deque(maxlen=WINDOW)
        """By step, how many times as long as usual all workers took at least."""
        self._steps_of_table = 0
        self._cycles: deque[float] = deque(maxlen=20)
        self._round_cycles: deque[float] = deque(maxlen=200)
        """Since the round was judged."""
        self._besides: deque[float] = deque(maxlen=WINDOW)
        """By round, what its steps took besides the slowest worker, by what was known of the workers then."""
        self._lately: dict[int, deque[float]] = {}
        """Durations of the steps that the workers' own times are from, under the table in force."""

    def introduce(self, slot: int, profile: Profile) -> None:
        """A worker has come, with what is known of its hardware, and perhaps of this model's step on it.

        What was learnt in its slot stays, if it runs on the same hardware as its predecessor.
        """
        self.learn()  # What was told of its predecessor.
        before = self.profiles.get(slot)
        self.profiles[slot] = profile
        if before is not None:
            if (before.hardware, before.cores) == (profile.hardware, profile.cores):
                return
            self.changed.add(slot)
        self._models.pop(slot, None)
        self._waiting.pop(slot, None)
        if profile.step is not None:
            self._models[slot] = StepTimeModel(_times(1 / self.level(), profile.step))

    def observe(self, slot: int, samples: int, seconds: float, cycle_s: float | None = None) -> None:
        """A worker's step: its samples, its time without what it waited for others, and with that."""
        if cycle_s is not None:
            self._cycles.append(cycle_s)
            self._round_cycles.append(cycle_s)
            self._lately.setdefault(slot, deque(maxlen=WINDOW)).append(cycle_s)
        if samples > 0 and seconds > 0:
            self._num_observed[slot] = self._num_observed.get(slot, 0) + 1
            self._heard.add(slot)
            if slot not in self._models:  # A first estimate, at once. It has no level.
                self._models[slot] = StepTimeModel()
                self._models[slot].observe(samples, seconds / self.level())
            else:
                self._waiting.setdefault(slot, deque(maxlen=MOST_WAITING)).append((samples, seconds))

    @property
    def num_heard(self) -> int:
        """How many have told of a step in this round."""
        return len(self._heard)

    def round_is_over(self, slots: Iterable[int]) -> bool:
        """Whether each of these has told of a step since this was last true; then it learns from what they told.

        No worker tells of its next step before all have told of this one, unless steps are short and told together.
        """
        slots = set(slots)
        if not self._heard >= slots:
            return False
        for gone in self._waiting.keys() - slots:
            del self._waiting[gone]
        self.learn()
        self._heard.clear()
        return True

    def learn(self) -> None:
        """Learn from what was told since the last time, step by step."""
        num_steps = max(map(len, self._waiting.values()), default=0)
        for before_last in reversed(range(num_steps)):  # The last one is the same step for all.
            step = {slot: told[-1 - before_last] for slot, told in self._waiting.items() if len(told) > before_last}
            level = self._level_of(step)
            for slot, (samples, seconds) in step.items():
                self._models[slot].observe(samples, seconds / level)
        self._waiting.clear()

    def _level_of(self, step: Mapping[int, tuple[int, float]]) -> float:
        usual = {slot: self._models[slot].usual_s(samples) for slot, (samples, _) in step.items()}
        off = [seconds / usual_s for slot, (_, seconds) in step.items() if (usual_s := usual[slot]) is not None]
        if len(off) < 2:
            self._put_level_into_models()
            return 1.0
        level = max(1.0, min(off)) * min(1.0, max(off))
        self._levels.append(level)
        self._steps_of_table += 1
        if len(self._levels) == WINDOW and abs(self.level() - 1) > FAR:
            self._put_level_into_models()
            level = self._levels[-1]
        return level

    def _put_level_into_models(self) -> None:
        """Models are of times as they are from then on; what is told outside stays the same."""
        level = self.level()
        for model in self._models.values():
            model.scale(level)
        for _ in range(len(self._levels)):
            self._levels.append(self._levels.popleft() / level)

    def num_observed(self, slots: Iterable[int]) -> int:
        """Observations since the table in force was made, of the worker with the fewest."""
        return min((self._num_observed.get(slot, 0) for slot in slots), default=0)

    def table_issued(self) -> None:
        """Another table is in force from now on."""
        self._num_observed.clear()
        self._lately.clear()
        self._steps_of_table = 0
        self.changed.clear()

    def level(self, *, lately: bool = False) -> float:
        """The median of the last steps; ``lately``: of those that :attr:`cycle_s` is the median of."""
        levels = list(self._levels)
        count = self._steps_of_table if lately and self._steps_of_table else WINDOW // 2
        return statistics.median(levels[-count:]) if levels else 1.0

    def cost(self, slot: int, *, lately: bool = False) -> StepCost | None:
        """What is known of a worker's step time; ``lately`` as in :meth:`level`."""
        model = self._models.get(slot)
        cost = model.cost if model is not None else None
        return _times(self.level(lately=lately), cost) if cost is not None else None

    def costs(self, slots: Collection[int]) -> dict[int, StepCost]:
        """The step times of those workers of which they are known."""
        return {slot: cost for slot in slots if (cost := self.cost(slot)) is not None}

    def guess(self, slot: int) -> StepCost | None:
        """The step time of a worker that has done no step here, from its hardware.

        It is that of the known worker whose speed in fp32 matrix products is nearest, times the ratio of these speeds.
        """
        flops = {s: p.flops["fp32"].median for s, p in self.profiles.items() if "fp32" in p.flops}
        known = self.costs(flops)
        if slot not in flops or not known:
            return None
        nearest = min(known, key=lambda s: abs(math.log(flops[s] / flops[slot])))
        ratio = flops[nearest] / flops[slot]
        return StepCost(ratio * known[nearest].fixed_s, ratio * known[nearest].per_sample_s)

    def uncertainty(self, slots: Iterable[int]) -> float:
        """Relative standard error of the least certain of these estimates."""
        return max(self._models[slot].uncertainty for slot in slots)

    def judge_round(self, costs: Mapping[int, StepCost], samples: Mapping[int, int]) -> None:
        """Learn from a round that is over what steps take besides the slowest of these workers."""
        if self._round_cycles:
            self._besides.append(statistics.fmean(self._round_cycles) - slowest(costs, samples))
            self._round_cycles.clear()

    def messages_change(self) -> None:
        """Messages take another time from now on."""
        self._besides.clear()
        self._round_cycles.clear()

    @property
    def besides_s(self) -> float:
        """What a step takes besides its slowest worker: the way of the messages, and chance.

        The mean over the last rounds, of whatever shares: throughput follows the mean step, and single ones say little.
        """
        return max(0.0, statistics.fmean(self._besides)) if self._besides else 0.0

    @property
    def cycle_s(self) -> float | None:
        """The median of the last steps' durations, of as many steps as own times are from: both are compared."""
        lately = [cycle_s for seen in self._lately.values() for cycle_s in seen] or self._cycles
        return statistics.median(lately) if lately else None


def _times(factor: float, cost: StepCost) -> StepCost:
    return StepCost(factor * cost.fixed_s, factor * cost.per_sample_s)


def slowest(costs: Mapping[int, StepCost], samples: Mapping[int, int]) -> float:
    """The time of the slowest worker that has samples, seconds."""
    return slowest_s([costs[slot] for slot in samples], list(samples.values()))
