"""From what workers take for their steps to the table that all of them follow: scores, shares, gradient weights."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from raytrain_het.balance.auto_compression import Choice, Compression
from raytrain_het.balance.batch_shares import StepCost, apportion, balanced_shares, proportional_shares
from raytrain_het.balance.gradient_weights import gradient_weights, normalised_scores
from raytrain_het.balance.owner_shards import busiest_link_s, owner_parts
from raytrain_het.balance.paths import PathRates
from raytrain_het.balance.profile import Profile
from raytrain_het.balance.scores import Policy
from raytrain_het.balance.scores import scores as scores_by
from raytrain_het.balance.speeds import Speeds, slowest
from raytrain_het.config import HetConfig

MIN_GAIN = 0.02
"""A new table has to promise a step that is shorter by this part, and by as much as the estimates may be off."""
LINK_PART = 0.1
"""Links that are busy for less than this part of a step are ignored."""
LINK_ROUNDS = 3
"""Other owners must look better for so many rounds in a row, and for twice as many after each table made for that."""
NUM_NEEDED = 3
"""Shares follow from steps once so many of every worker were seen, after each change."""


@dataclass(frozen=True)
class Table:
    """Scores, gradient weights and shares that all workers follow, by slot."""

    version: int
    scores: dict[int, float]
    """``p_i``, samples per second at an equal share, scaled to mean 1."""
    gradient_weights: dict[int, float]
    """``r_i``, see :mod:`raytrain_het.balance.gradient_weights`."""
    shares: dict[int, int]
    """Samples of a full global batch."""
    predicted_step_s: float | None
    """A whole step's time; None where only the hardware is known, and without messages in a run's first table."""
    reason: str
    links_s: dict[int, float] = dataclasses.field(default_factory=dict)
    """Seconds for a whole gradient over a worker's link, where links are slow enough to matter; else empty."""
    codecs: dict[int, str] = dataclasses.field(default_factory=dict)
    """Codecs that were chosen, by slot; empty where they are given."""
    hierarchy: bool = False
    """Whether it was chosen that gradients are added up on each machine first."""

    def links_of(self, slots: Iterable[int]) -> list[float]:
        """``links_s`` in the order of these slots, the median for a slot without one; empty if links do not matter."""
        usual = statistics.median(self.links_s.values()) if self.links_s else 0.0
        return [self.links_s.get(slot, usual) for slot in slots] if self.links_s else []

    def codecs_of(self, slots: Iterable[int], default: str) -> list[str]:
        """``codecs`` in the order of these slots, the most usual one for other slots; the default if there are none."""
        (usual, _), *_ = [*Counter(self.codecs.values()).most_common(1), (default, 0)]
        return [self.codecs.get(slot, usual) for slot in slots]

    @property
    def unhurried_s(self) -> float:
        """A link may be busy for so long in a step in any case."""
        return LINK_PART * (self.predicted_step_s or 0.0)


class Scoreboard:
    """Observations in, tables out: a first one, one that fits who has come, and one that is better.

    Args:
        config: the run's settings. With ``shares="auto"`` shares follow the measured speeds: with the score policy
            ``train_step`` they balance the step times, with any other they are in proportion to the scores. With given
            shares only scores and gradient weights come from here.
        compression: chooses codecs; None where they are given.
    """

    def __init__(self, config: HetConfig, compression: Compression | None = None) -> None:
        self.config, self.compression = config, compression
        self._balances = config.shares == "auto"
        self._by_steps = config.score_policy == "train_step"
        self.table: Table | None = None
        self.global_batch_size = 0
        self._speeds, self._paths = Speeds(), PathRates()
        self._leaders: Mapping[int, int] = {}
        self._link_rounds, self._link_rounds_needed = 0, LINK_ROUNDS
        self._besides_s = 0.0
        """What the table in force reckons with besides its slowest worker."""

    def introduce(self, slot: int, profile: Profile) -> None:
        """See :meth:`Speeds.introduce`."""
        self._speeds.introduce(slot, profile)
        self._paths.forget(slot)

    def observe(self, slot: int, samples: int, seconds: float, cycle_s: float | None = None) -> None:
        """See :meth:`Speeds.observe`."""
        self._speeds.observe(slot, samples, seconds, cycle_s)

    def may_be_over(self, num_workers: int) -> bool:
        """Whether so many have told of a step in this round; :meth:`round_is_over` knows it exactly."""
        return self._speeds.num_heard >= num_workers

    def round_is_over(self, slots: Iterable[int]) -> bool:
        """See :meth:`Speeds.round_is_over`. For callers that look for no better table."""
        return self._speeds.round_is_over(slots)

    def observe_paths(self, slot: int, sent: Mapping[int, tuple[float, float]], gradient_bytes: int = 1) -> None:
        """See :meth:`PathRates.observe`."""
        self._paths.observe(slot, sent, gradient_bytes)

    def place(self, hosts: Mapping[int, str], leaders: Mapping[int, int]) -> None:
        """By slot: on which machine workers are and, where gradients are added up there, who sends them on."""
        self._paths.hosts, self._leaders = hosts, leaders

    # ---------------------------------------------------------------- tables

    def fitting(self, slots: Iterable[int]) -> Table | None:
        """A table for these workers, where there is none yet or the one in force is about others, or other hardware.

        The first one is from kept step times if there are any of all workers, else from the hardware. Later, who has
        done no step yet is taken to be as much faster than the others as its hardware is. None where the table in
        force fits, or too little is known.

        Raises:
            ConfigError, ValueError: the policy fails or needs what was not measured, or it gives no valid
                score or gradient weight.
        """
        slots = sorted(slots)
        came = [s for s in slots if self.table is None or s not in self.table.shares or s in self._speeds.changed]
        wanted = self._balances or self.config.alpha != 0 or not self._by_steps
        if not came or not wanted or self.global_batch_size < len(slots):
            return None
        if not self._by_steps:
            return self._from_profiles(slots, self.config.score_policy, "from the score policy")
        self._speeds.learn()
        costs = self._speeds.costs(slots)
        if self.table is None:
            if len(costs) < len(slots):
                return self._from_profiles(slots, "flops", "from the hardware")
            return self._from_costs(costs, "from step times of earlier runs")
        costs |= {s: cost for s in came if s not in costs and (cost := self._speeds.guess(s)) is not None}
        if len(costs) < len(slots):
            return None
        reason = f"worker {', '.join(map(str, came))} has come"
        return self._from_costs({s: costs[s] for s in slots}, reason, spares=self.config.warm_spares)

    def better(self, slots: Iterable[int], shares: Mapping[int, int]) -> Table | None:
        """A table that is worth a change; None if there is none.

        Args:
            slots: who takes part.
            shares: samples of a full global batch that each has now.
        """
        slots = sorted(slots)
        if not self._speeds.round_is_over(slots):
            return None
        costs = self._speeds.costs(slots)
        seen = self._speeds.num_observed(slots)
        if len(costs) < len(slots) or seen < NUM_NEEDED or self.global_batch_size < len(slots):
            return None
        now = {slot: shares.get(slot, 0) for slot in slots}
        best = self._balanced(costs, spares=self.config.warm_spares) if self._balances and self._by_steps else now
        self._speeds.judge_round(costs, now)
        besides_s = self._speeds.besides_s  # It stays, whatever the shares.
        before, after = slowest(costs, now) + besides_s, slowest(costs, best) + besides_s
        scores = self._scores_of(costs)
        if not self._by_steps and self.table is not None:
            scores = {slot: self.table.scores.get(slot, 1.0) for slot in slots}
        if after < (1 - MIN_GAIN - self._speeds.uncertainty(slots)) * before:
            reason = f"a step of {1000 * before:.4g} ms becomes one of {1000 * after:.4g} ms"
            return self._issue(scores, best, reason + _spares(best), step_s=after, besides_s=besides_s)
        if self.config.alpha != 0 and self._by_steps and (self.table is None or self._moved(scores, self.table.scores)):
            reason = "scores are known now" if self.table is None else "scores have changed"
            return self._issue(scores, now, reason, step_s=before, besides_s=besides_s)
        other_codecs = self._other_codecs(scores, now, compute_s=before - besides_s, besides_s=besides_s)
        return other_codecs or self._lighter_links(scores, now, step_s=before, besides_s=besides_s)

    def _other_codecs(
        self, scores: dict[int, float], shares: dict[int, int], *, compute_s: float, besides_s: float
    ) -> Table | None:
        """The same shares, and codecs with which steps are shorter."""
        if self.compression is None:
            return None
        now = [self.compression.allowed[0]] * len(scores)
        if self.table is not None:
            now = self.table.codecs_of(scores, now[0])
        by_slot = dict(zip(scores, now, strict=True))
        byte_s = self._of_links(self._paths.byte_s, scores)
        choice = self.compression.better(
            by_slot,
            byte_s,
            scores,
            compute_s=compute_s,
            besides_s=besides_s,
            hosts=self._paths.hosts,
            by_machine=bool(self._leaders),
        )
        if choice is None:
            return None
        self._speeds.messages_change()
        return self._issue(
            scores,
            shares,
            choice.reason,
            step_s=choice.step_s,
            besides_s=choice.step_s - compute_s,
            links_s=choice.links_s if max(choice.links_s.values()) > LINK_PART * choice.step_s else {},
            choice=choice,
        )

    def _of_links(
        self, measure: Callable[[Collection[int]], dict[int, float]], slots: Collection[int]
    ) -> dict[int, float]:
        """A measure of each worker's link. With leaders only theirs is seen, which the others would share."""
        if not self._leaders:
            return measure(slots)
        of_leaders = measure(sorted(set(self._leaders.values())))
        sharing = Counter(self._leaders.values())
        return {slot: of_leaders[k] * sharing[k] for slot in slots if (k := self._leaders.get(slot)) in of_leaders}

    def _lighter_links(
        self, scores: dict[int, float], shares: dict[int, int], *, step_s: float, besides_s: float
    ) -> Table | None:
        """The same shares, and owner shards that keep the busiest link much shorter."""
        links = self._of_links(self._paths.links_s, scores)
        if not links:
            return None
        speeds, known, unhurried_s = [1.0] * len(scores), list[float](), 0.0
        if self.table is not None:
            speeds = [self.table.scores.get(slot, 1.0) for slot in scores]
            known, unhurried_s = self.table.links_of(scores), self.table.unhurried_s
        there = list(links.values())
        now = busiest_link_s(owner_parts(speeds, known, unhurried_s), there)
        best = busiest_link_s(owner_parts(list(scores.values()), there, LINK_PART * step_s), there)
        by_speed = busiest_link_s(owner_parts(list(scores.values())), there)
        fast_again = bool(known) and by_speed <= LINK_PART * step_s / 2
        if now - best < LINK_PART * step_s and not fast_again:
            self._link_rounds = 0
            return None
        self._link_rounds += 1
        if self._link_rounds < self._link_rounds_needed:
            return None
        self._link_rounds, self._link_rounds_needed = 0, 2 * self._link_rounds_needed
        reason = "owner shards by speed again: links are fast now"
        if not fast_again:
            reason = (
                f"owner shards by links: the busiest one needs about {1000 * best:.4g} ms a step instead of "
                f"{1000 * now:.4g}"
            )
        return self._issue(
            scores, shares, reason, step_s=step_s, besides_s=besides_s, links_s={} if fast_again else links
        )

    def _from_profiles(self, slots: list[int], policy: str | Policy, reason: str) -> Table | None:
        profiles = {slot: self._speeds.profiles[slot] for slot in slots if slot in self._speeds.profiles}
        if len(profiles) < len(slots):
            return None
        scores = scores_by(profiles, policy)
        shares = self._in_proportion(scores) if self._balances else self._given(slots)
        return self._issue(scores, shares, reason)

    def _from_costs(self, costs: Mapping[int, StepCost], reason: str, *, spares: bool = False) -> Table:
        shares = self._balanced(costs, spares=spares) if self._balances else self._given(list(costs))
        step_s = slowest(costs, shares) + self._besides_s
        reason = reason + _spares(shares) if self._balances else reason
        return self._issue(self._scores_of(costs), shares, reason, step_s=step_s, besides_s=self._besides_s)

    def _issue(
        self,
        scores: dict[int, float],
        shares: dict[int, int],
        reason: str,
        *,
        step_s: float | None = None,
        besides_s: float = 0.0,
        links_s: Mapping[int, float] | None = None,
        choice: Choice | None = None,
    ) -> Table:
        """Put a table in force.

        Args:
            scores: by slot.
            shares: by slot, samples of a full global batch.
            reason: why, for people.
            step_s: what a whole step will take; None where it is not known.
            besides_s: what of this is not the slowest worker's own time.
            links_s: seconds for a whole gradient over each link; None: those of the last table, as they are by now.
            choice: new codecs; None: those of the last table.
        """
        before = self.table.links_s if self.table is not None else {}
        if choice is not None:
            codecs, hierarchy = choice.codecs, choice.by_machine
        elif self.table is not None:
            codecs, hierarchy = self.table.codecs, self.table.hierarchy
        else:
            codecs, hierarchy = {}, False
        if before and links_s is None:  # They still matter: measure them anew.
            links_s = self._of_links(self._paths.links_s, scores) or before
        self.table = Table(
            version=self.table.version + 1 if self.table is not None else 1,
            scores=scores,
            gradient_weights=gradient_weights(scores, self.config.alpha),
            shares=shares,
            predicted_step_s=step_s,
            reason=reason,
            links_s=dict(links_s or {}),
            codecs=dict(codecs),
            hierarchy=hierarchy,
        )
        self._besides_s = besides_s
        self._speeds.table_issued()
        return self.table

    # ---------------------------------------------------------------- shares

    def _balanced(self, costs: Mapping[int, StepCost], *, spares: bool) -> dict[int, int]:
        shares = balanced_shares(list(costs.values()), self.global_batch_size, minimum=0 if spares else None)
        return dict(zip(costs, shares, strict=True))

    def _in_proportion(self, scores: Mapping[int, float]) -> dict[int, int]:
        shares = proportional_shares(list(scores.values()), self.global_batch_size)
        return dict(zip(scores, shares, strict=True))

    def _given(self, slots: list[int]) -> dict[int, int]:
        given = self.config.given_shares or (1.0,)
        mean = sum(given) / len(given)
        weights = [given[slot] if slot < len(given) else mean for slot in slots]
        equal = [1.0] * len(slots)
        return dict(zip(slots, apportion(self.global_batch_size, weights if sum(weights) > 0 else equal), strict=True))

    # ---------------------------------------------------------------- scores and what is shown

    def scores(self, slots: Collection[int]) -> dict[int, float]:
        """``p_i`` of those that have been seen, with mean 1."""
        if not self._by_steps:
            return {slot: p for slot, p in self.table.scores.items() if slot in slots} if self.table else {}
        return self._scores_of(self._speeds.costs(slots))

    def _scores_of(self, costs: Mapping[int, StepCost]) -> dict[int, float]:
        equal = self.global_batch_size / max(len(costs), 1)
        return normalised_scores({slot: equal / cost.step_s(equal) for slot, cost in costs.items()})

    @staticmethod
    def _moved(scores: Mapping[int, float], old: Mapping[int, float]) -> bool:
        return scores.keys() != old.keys() or any(abs(scores[s] / old[s] - 1) > 0.1 for s in scores)

    def solo_samples_per_s(self, slot: int, samples: int) -> float | None:
        """What a worker would do by itself with such a batch, ``b / t(b)``."""
        cost = self._speeds.cost(slot, lately=True)
        return samples / cost.step_s(samples) if cost is not None and samples > 0 else None

    @property
    def samples_per_s(self) -> float | None:
        """What all do together: the global batch over the median of the last steps' durations."""
        return self.global_batch_size / self._speeds.cycle_s if self._speeds.cycle_s is not None else None

    def expected_samples_per_s(self, samples: Mapping[int, int]) -> float | None:
        """What these shares will do by all that is known now; None where somebody's step time is not."""
        now = {slot: b for slot, b in samples.items() if b > 0}
        costs = self._speeds.costs(now)
        if not now or len(costs) < len(now):
            return None
        return self.global_batch_size / (slowest(costs, now) + self._speeds.besides_s)

    def predicted_samples_per_s(self, samples: Mapping[int, int]) -> float | None:
        """What the table in force has promised, if these are its shares.

        Of other ones, as after a loss, it is what the same reckoning gives for them; None where somebody's step time
        is not known.
        """
        table = self.table
        if table is None or table.predicted_step_s is None:
            return None
        now, promised = ({slot: b for slot, b in shares.items() if b > 0} for shares in (samples, table.shares))
        if now == promised:
            return self.global_batch_size / table.predicted_step_s
        costs = self._speeds.costs(now)
        if not now or len(costs) < len(now):
            return None
        return self.global_batch_size / (slowest(costs, now) + self._besides_s)


def _spares(shares: Mapping[int, int]) -> str:
    spares = [str(slot) for slot, b in shares.items() if b == 0]
    return f"; worker {', '.join(spares)} costs more than it gives, and is a warm spare" if spares else ""
