"""When it is no use going on: a slot that only dies, a step that kills whoever takes it, links that never hold."""

from __future__ import annotations

from collections import Counter

from raytrain_het.membership.peers import Peer

MAX_FRUITLESS_DEATHS = 3
"""A slot that dies so often without a commit stays vacant; a step in which so many generations lost members
fails the run."""
MAX_FRUITLESS_GENERATIONS = 20
"""So many generations in a row voided without a death or a commit fail the run: some link must be broken."""


class Deaths:
    """Counts what came to nothing. A worker that was dropped counts as one that died."""

    def __init__(self) -> None:
        self.fruitless: Counter[int] = Counter()
        """By slot: workers lost since one of them last committed a step."""
        self.in_step: Counter[int] = Counter()
        """By step: generations that lost members in it. How many at once does not matter: a power cut takes all."""
        self.lost: list[Peer] = []
        """Members that died in a step which they held and took part in, since the last generation was formed."""
        self.voids_in_a_row = 0
        """Generations voided without anybody lost and without a commit in between."""

    def lose_slot(self, slot: int) -> bool:
        """Count that the worker in a slot was lost; whether the slot is to be given up."""
        self.fruitless[slot] += 1
        return self.fruitless[slot] >= MAX_FRUITLESS_DEATHS

    def lose_member(self, peer: Peer) -> None:
        """It died in a step that it took part in."""
        self.lost.append(peer)

    def commit(self, slot: int) -> None:
        """The worker in a slot has committed a step."""
        self.fruitless[slot] = 0

    def lose_generation(self) -> bool:
        """Count that a generation was voided; whether that is one too many."""
        self.voids_in_a_row += 1
        return self.voids_in_a_row > MAX_FRUITLESS_GENERATIONS

    def links_hold(self) -> None:
        """The run has moved on, or somebody was to blame."""
        self.voids_in_a_row = 0

    def last_step(self) -> int:
        """The highest that those who were lost are known to have committed."""
        return max((max(p.reached, p.cursor.step) for p in self.lost), default=0)

    def form_generation(self, base: int) -> list[Peer]:
        """Count those lost since the last generation, in the step after ``base``: to be called once for each that is
        formed.

        Returns them if this step has now cost too many generations a member.
        """
        # Those of later steps stay when a run starts again from its last checkpoint: it will come to them once more.
        for step in [s for s in self.in_step if s <= base]:
            del self.in_step[step]
        lost, self.lost = self.lost, []
        self.in_step[base + 1] += bool(lost)
        return lost if self.in_step[base + 1] >= MAX_FRUITLESS_DEATHS else []
