"""Which codec each worker uses under ``compression="auto"``, and when that is thought over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytrain_het.balance.codec_choice import (
    CodecCost,
    Fleet,
    Prediction,
    choose,
    choose_by_machine,
    choose_way,
    predict,
)
from raytrain_het.codec_options import AUTO_CODECS

ROUNDS = 2
"""So many rounds in a row the links are known, before they are believed."""
MUCH_SLOWER = 1.5
"""Steps that take so many times what was promised, round after round, are a reason to think again."""


@dataclass(frozen=True)
class Choice:
    """A codec by slot."""

    codecs: dict[int, str]
    step_s: float
    """That is expected of a step with it."""
    links_s: dict[int, float]
    """Seconds for a whole gradient, so encoded, over a worker's link."""
    reason: str
    by_machine: bool = False
    """Whether gradients are added up on each machine first."""


class Compression:
    """Costs of codecs and rates of links in, a choice out. Pure bookkeeping, by slot.

    Links are measured on what gradients take anyway, at first uncompressed. A choice is made once for each set of
    workers; it is thought over where steps take much longer than it has promised, and where a codec loses more of the
    real gradients than is allowed.

    Args:
        error: how much a codec may lose of a message, see :attr:`CodecCost.error`.
        allowed: codecs to choose from, what loses nothing first.
        hierarchy: whether gradients are added up on each machine first; None: where that is faster.
    """

    def __init__(self, error: float, allowed: Sequence[str] = AUTO_CODECS, *, hierarchy: bool | None = False) -> None:
        self.error, self.allowed, self.hierarchy = error, tuple(allowed), hierarchy
        self._costs: dict[int, dict[str, CodecCost]] = {}
        self._num_elements = 0
        self._byte_cpu_s: dict[int, float] = {}
        self._byte_s: dict[int, float] = {}
        """By slot: seconds of a byte, as measured when the most of them went there."""
        self._chosen_for: frozenset[int] = frozenset()
        self._promised_s: float | None = None
        self._rounds = 0
        self._slow_rounds = 0

    def introduce(self, slot: int, told: Mapping[str, Any]) -> None:
        """A worker has come: what codecs cost there (``costs``), and its gradient's size (``num_elements``)."""
        self._costs[slot] = {word: CodecCost(*cost) for word, cost in told["costs"].items()}
        self._num_elements = told["num_elements"]
        self._byte_cpu_s[slot] = told.get("byte_cpu_s", 0.0)
        self._byte_s.pop(slot, None)
        self._chosen_for = frozenset()

    def observe_error(self, slot: int, word: str, error: float) -> None:
        """So much of a real message was lost.

        It counts in place of what was measured before, where that is more than is allowed.
        """
        cost = self._costs.get(slot, {}).get(word)
        if cost is not None and error > self.error:
            self._costs[slot][word] = dataclasses.replace(cost, error=error)
            self._chosen_for = frozenset()

    def better(
        self,
        now: Mapping[int, str],
        byte_s: Mapping[int, float],
        speeds: Mapping[int, float],
        *,
        compute_s: float,
        besides_s: float,
        hosts: Mapping[int, str] | None = None,
        by_machine: bool = False,
    ) -> Choice | None:
        """After a round of steps: another choice, if one promises more.

        Args:
            now: by slot of those that take part, its codec.
            byte_s: by slot, seconds of a byte as measured lately; empty while unknown.
            speeds: by slot, relative.
            compute_s: of a step what its slowest worker does, for messages too.
            besides_s: the rest: waiting for messages, mostly.
            hosts: by slot, the machine it is on; by default one of its own.
            by_machine: whether gradients are added up on each machine by now.
        """
        slots = list(now)
        if len(slots) < 2 or any(slot not in self._costs for slot in slots):
            return None
        self._watch(compute_s + besides_s)
        for slot, seconds in byte_s.items():
            if now[slot] == self.allowed[0] or slot not in self._byte_s:
                self._byte_s[slot] = seconds
        if not byte_s or self._chosen_for == frozenset(slots):
            self._rounds = 0
            return None
        self._rounds += 1
        if self._rounds < ROUNDS:
            return None
        self._rounds, self._chosen_for = 0, frozenset(slots)
        fleet = Fleet(
            num_elements=self._num_elements,
            costs=[self._costs[slot] for slot in slots],
            byte_s=[self._byte_s[slot] for slot in slots],
            speeds=[speeds.get(slot, 1.0) for slot in slots],
            compute_s=compute_s,
            byte_cpu_s=[self._byte_cpu_s[slot] for slot in slots],
            hosts=[hosts[slot] for slot in slots] if hosts else (),
        )
        by_machine = by_machine and 1 < len(set(fleet.hosts)) < len(slots)
        fleet = _as_seen(fleet, list(now.values()), besides_s, by_machine)
        chosen, will = self._choose(fleet)
        before = predict(fleet, list(now.values()), by_machine=by_machine)
        after = predict(fleet, chosen, by_machine=will)
        self._promised_s = after.step_s
        if (chosen, will) == (tuple(now.values()), by_machine):
            return None
        reason = _words(before, after) + ", added up on each machine first" * will
        codecs = dict(zip(slots, chosen, strict=True))
        links_s = {s: self._byte_s[s] * self._num_elements * self._costs[s][codecs[s]].num_bytes for s in slots}
        return Choice(codecs, after.step_s, links_s, reason, will)

    def _choose(self, fleet: Fleet) -> tuple[tuple[str, ...], bool]:
        if self.hierarchy is None:
            return choose_way(fleet, self.allowed, self.error)
        shared = 1 < len(set(fleet.hosts)) < len(fleet.costs)
        if self.hierarchy and shared:
            return choose_by_machine(fleet, self.allowed, self.error), True
        return choose(fleet, self.allowed, self.error), False

    def _watch(self, step_s: float) -> None:
        if self._promised_s is None or step_s <= MUCH_SLOWER * self._promised_s:
            self._slow_rounds = 0
            return
        self._slow_rounds += 1
        if self._slow_rounds == 3 * ROUNDS:
            self._promised_s, self._chosen_for = None, frozenset()
            self._byte_s.clear()  # They are what they are by now.


def _words(before: Prediction, after: Prediction) -> str:
    return (
        f"compression: a step of {1000 * before.step_s:.4g} ms becomes one of {1000 * after.step_s:.4g} ms, "
        f"its {_mib(before.num_bytes)} MiB of messages {_mib(after.num_bytes)} MiB"
    )


def _mib(num_bytes: Sequence[float]) -> str:
    return f"{max(num_bytes) / 2**20:.3g}"


def _as_seen(fleet: Fleet, codecs: list[str], besides_s: float, by_machine: bool) -> Fleet:
    """The fleet with links and computing as its steps show them: ``besides_s`` is what they take besides computing."""
    # What of the messages is not seen besides computing has passed beside it, as far as there was anything to pass
    # beside; the rest says that links are faster than they looked.
    present = predict(fleet, codecs, by_machine=by_machine)
    # What workers do for messages was counted as computing.
    work_s = min(present.cpu_s, fleet.compute_s / 2)
    compute_s, besides_s, exchange_s = fleet.compute_s - work_s, besides_s + work_s, present.exchange_s
    hidden_s = min(max(0.0, exchange_s - besides_s), compute_s)
    faster = min(1.0, (besides_s + hidden_s) / exchange_s) if exchange_s > 0 else 1.0
    hidden = hidden_s / (besides_s + hidden_s) if hidden_s > 0 else 0.0
    return dataclasses.replace(fleet, compute_s=compute_s, hidden=hidden, byte_s=[faster * s for s in fleet.byte_s])
