"""Telling a dead member from a slow one, in rounds of pings.

A round begins when a member has waited for its peers in a step for too long and suspects them, or when a member waits
outside of a step, where nobody else would notice a silent peer. All members are pinged. A member that was not heard for
``silence_s`` after that is silent; on a busy machine, where answers take longer, for several times as long as they
usually take. Once all were heard the round is over. A member that answers is dropped only after it was behind the
others for ``hang_limit_s``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytrain_het.config import HetConfig
from raytrain_het.membership.peers import Peer

USUAL_ANSWERS = 3.0
"""A member is silent when it takes so many times as long as answers usually take."""
FORGET = 0.05
"""By this part the usual time shrinks with every round."""


@dataclass
class Round:
    """One round of pings."""

    began: float
    in_a_step: bool = False
    """Whether a member has suspected others that it waits for in a step."""
    vouched: bool = False
    """Whether a watchman has answered for its worker."""

    def unheard(self, peers: Sequence[Peer]) -> list[Peer]:
        """The members that were not heard since it began."""
        return [p for p in peers if p.heard <= self.began]


class Suspicion:
    """The rounds of one run, and since when members wait in the step under way."""

    def __init__(self, config: HetConfig) -> None:
        self.config = config
        self.round: Round | None = None
        self._answers_take_s = 0.0
        """How long the last member took to answer, in the worst of the last rounds."""
        self.since: tuple[int, int, float] | None = None
        """Generation and step in which a member waits for others, and since when."""

    def forget(self) -> None:
        """A new generation has begun: nobody waits yet."""
        self.round, self.since = None, None

    def begin(self, now: float) -> bool:
        """Begin a round, unless one is under way; whether members are to be pinged."""
        if self.round is not None:
            return False
        self.round = Round(began=now)
        return True

    def suspect(self, generation: int, step: int, now: float) -> bool:
        """A member has waited too long in a step; whether members are to be pinged."""
        if self.since is None or self.since[:2] != (generation, step):
            self.since = (generation, step, now)
        begins = self.round is None
        self.round = self.round or Round(began=now)
        self.round.in_a_step = True
        return begins

    def vouch(self) -> None:
        """A watchman says that its worker runs: how long that took is not how long answers take."""
        if self.round is not None:
            self.round.vouched = True

    @property
    def patience_s(self) -> float:
        """How long a member may leave a ping unanswered."""
        return min(max(self.config.silence_s, USUAL_ANSWERS * self._answers_take_s), self.config.hang_limit_s)

    def unheard(self, peers: Sequence[Peer], now: float) -> list[Peer]:
        """The members that have not answered yet, when half of the patience with them is over."""
        if self.round is None or now - self.round.began < self.patience_s / 2:
            return []
        return self.round.unheard(peers)

    def silent(self, peers: Sequence[Peer], now: float) -> list[Peer]:
        """The members that the patience is over with. Ends the round if it has lasted long enough."""
        if self.round is None or now - self.round.began < self.patience_s:
            return []
        silent = self.round.unheard(peers)
        self.round = None
        return silent

    def settled(self, peers: Sequence[Peer], now: float) -> bool | None:
        """Ends the round if all were heard, and says whether a member had suspected others; None if it goes on."""
        if self.round is None or self.round.unheard(peers):
            return None
        over, self.round = self.round, None
        took_s = now - over.began if not over.vouched else 0.0
        self._answers_take_s = max(took_s, (1 - FORGET) * self._answers_take_s)
        return over.in_a_step

    def late(self, peers: Sequence[Peer], now: float) -> list[Peer]:
        """The members that answer, but hold the others up in a step for longer than the hang limit."""
        if self.since is None or now - self.since[2] < self.config.hang_limit_s:
            return []
        furthest = max(p.position for p in peers)
        return [p for p in peers if p.position < furthest]
