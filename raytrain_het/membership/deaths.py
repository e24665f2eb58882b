"""When to give up: a slot whose workers only die, a step that kills its workers, links that never hold."""

from __future__ import annotations

from collections import Counter

from raytrain_het.membership.peers import Peer

MAX_FRUITLESS_DEATHS = 3
"""A slot that dies so often without a commit stays vacant; a step in which so many generations lost members
fails the run."""
MAX_FRUITLESS_GENERATIONS = 20
"""So many generations in a row voided without a death or a commit fail the run: some link must be broken."""


class Deaths:
    """Counts deaths and failures without progress. A worker that was dropped counts as one that died."""

    def __init__(self) -> None:
        self.fruitless: Counter[int] = Counter()
        """By slot: workers lost since one of them last committed a step."""
        self.in_step: Counter[int] = Counter()
        """By step: generations that lost members in it. How many at once does not matter: a power cut
        takes all."""
        self.lost: list[Peer] = []
        """Members that died in a step that they took part in, since the last generation was formed."""
        self.voids_in_a_row = 0
        """Generations that were voided in a row, with no member lost and no commit in between."""

    def lose_slot(self, slot: int) -> bool:
        """Count that the worker in a slot was lost. Returns whether the slot is to be given up."""
        self.fruitless[slot] += 1
        return self.fruitless[slot] >= MAX_FRUITLESS_DEATHS

    def lose_member(self, peer: Peer) -> None:
        """A member died in a step that it took part in."""
        self.lost.append(peer)

    def commit(self, slot: int) -> None:
        """The worker in a slot has committed a step."""
        self.fruitless[slot] = 0

    def lose_generation(self) -> bool:
        """Count that a generation was voided. Returns whether that is one too many."""
        self.voids_in_a_row += 1
        return self.voids_in_a_row > MAX_FRUITLESS_GENERATIONS

    def links_hold(self) -> None:
        """The run has moved on, or a member was to blame for the failure."""
        self.voids_in_a_row = 0

    def last_step(self) -> int:
        """The last step that the lost members are known to have committed."""
        return max((max(p.reached, p.cursor.step) for p in self.lost), default=0)

    def form_generation(self, base: int) -> list[Peer]:
        """Count the members lost since the last generation, in the step after ``base``.

        Call it once for each generation that is formed. Returns the lost members if this step has now cost too many
        generations a member.
        """
        # Counts of later steps stay when a run starts again from its last checkpoint: it comes to these steps again.
        for step in [s for s in self.in_step if s <= base]:
            del self.in_step[step]
        lost, self.lost = self.lost, []
        self.in_step[base + 1] += bool(lost)
        return lost if self.in_step[base + 1] >= MAX_FRUITLESS_DEATHS else []
