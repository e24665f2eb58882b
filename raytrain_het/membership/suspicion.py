"""Telling a dead member from a slow one.

A *round*: all members are pinged, because one has waited for its peers in a step for too long and suspects them, or
because somebody waits outside of a step, where nobody would notice. Whoever has not been heard of ``silence_s`` after
the round began is taken for dead. Once all have been heard of it is over, and those that suspected are told to have
patience; only whoever is behind the others for ``hang_limit_s`` is dropped although it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from raytrain_het.config import HetConfig
from raytrain_het.membership.peers import Peer


@dataclass
class Round:
    """One round of pings."""

    began: float
    suspecting: set[str] = field(default_factory=set)
    """Ids of the members that wait to hear how it ends."""

    def silent(self, peers: Sequence[Peer]) -> list[Peer]:
        """Who has not been heard of since it began."""
        return [p for p in peers if p.heard <= self.began]


class Suspicion:
    """The rounds of one run, and since when the step under way is waited for."""

    def __init__(self, config: HetConfig) -> None:
        self.config = config
        self.round: Round | None = None
        self.since: tuple[int, int, float] | None = None
        """Generation and step in which somebody is waited for, and since when."""

    def forget(self) -> None:
        """A new generation has begun: nobody waits yet."""
        self.round, self.since = None, None

    def begin(self, now: float) -> bool:
        """Begin a round, unless one is under way; whether members are to be pinged."""
        if self.round is not None:
            return False
        self.round = Round(began=now)
        return True

    def suspect(self, uid: str, generation: int, step: int, now: float) -> bool:
        """A member has waited too long in a step; whether members are to be pinged."""
        if self.since is None or self.since[:2] != (generation, step):
            self.since = (generation, step, now)
        began = self.begin(now)
        assert self.round is not None
        self.round.suspecting.add(uid)
        return began

    def dead(self, peers: Sequence[Peer], now: float) -> list[Peer]:
        """Whom to drop as dead. Ends the round if it has lasted long enough."""
        if self.round is None or now - self.round.began < self.config.silence_s:
            return []
        silent = self.round.silent(peers)
        self.round = None
        return silent

    def settled(self, peers: Sequence[Peer]) -> set[str] | None:
        """Who is to be told to have patience. Ends the round if all have been heard of; None if it goes on."""
        if self.round is None or self.round.silent(peers):
            return None
        suspecting, self.round = self.round.suspecting, None
        return suspecting

    def late(self, peers: Sequence[Peer], now: float) -> list[Peer]:
        """Who answers, but has been behind the others in a step for longer than anybody has to wait."""
        if self.since is None or now - self.since[2] < self.config.hang_limit_s:
            return []
        furthest = max(p.position for p in peers)
        return [p for p in peers if p.position < furthest]
