"""The processes that the hub knows, where each stands, and what the next generation begins with."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.place import Place
from raytrain_het.membership.record import Member, Record


class Phase(enum.Enum):
    """Where a member stands."""

    JOINING = "joining"
    IN = "in"
    LEAVING = "leaving"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a member stands, by its own word."""

    cursor: Cursor = Cursor()
    """What it has committed."""
    healed: bool = False
    """Whether it holds the run's state at this cursor; else it is catching up, or has yet to begin."""
    fresh: bool = False
    """Healed by replay, and not yet compared with the others."""

    def under(self, record: Record | None, uid: str) -> Standing:
        """The same under a record. A member that has come back and is to heal holds a state of the past, and may not
        have come to see it."""
        stale = record is not None and uid in record.unhealed and self.healed and not self.fresh
        return dataclasses.replace(self, healed=False) if stale else self


@dataclass
class Peer:
    """A process that is connected to the hub."""

    member: Member
    phase: Phase
    heard: float
    """When it last said something, or was last known to run."""
    known_to_run: float = -math.inf
    """When its watchman last said that it runs."""
    away: bool = False
    """Whether its connection has closed. That says nothing of the process: it connects again if it can."""
    cursor: Cursor = Cursor()
    healed: bool = False
    fresh: bool = False
    """Cursor, healed and fresh are as in :class:`Standing`."""
    first_base: int = -1
    reports_after: int = -1
    """It gives no part of reports of steps up to this one, since it was not there yet."""
    answered: bool = False
    """Whether it has answered to the generation being formed."""
    reached: int = 0
    """The last step that it has said to have committed: for people and for the count of deaths, never for a base."""
    position: int = 0
    """How far it is in its collectives. It shows which member holds up the others."""
    place: Place = field(default_factory=Place)
    """Where its training function is, as it answered last."""
    place_since: float = 0.0
    """When it was first heard to be there."""
    place_heard: float = -math.inf
    """When it last said so."""
    left_out: float | None = None
    """The norm of its residual, as it said last: for people."""
    confirmed: bool = False
    """Whether it has finished, and knows that all have committed its last step."""
    returning: bool = False
    """Its function has returned, and its reports are still to be stored. The others may wait for its next step."""
    batch: list[int] | None = None
    """``[epoch, first sample, samples]`` of the step that is open, as it answered."""

    @property
    def holds_state(self) -> bool:
        """Whether it holds the run's state, and this is certain."""
        return self.healed and not self.fresh

    def stands(self, standing: Standing) -> None:
        """It has said where it stands."""
        self.cursor, self.healed, self.fresh = standing.cursor, standing.healed, standing.fresh

    def is_at(self, place: Place, position: int, now: float) -> None:
        """It has answered a ping, and said where it is."""
        if (place, position) != (self.place, self.position) or self.place_heard == -math.inf:
            self.place_since = now
        self.place, self.position, self.place_heard = place, position, now


@dataclass(frozen=True, kw_only=True)
class Suspended:
    """A member that does not answer, and without which the others go on."""

    peer: Peer
    """As it stood."""
    since: float
    generation: int
    """Number of the record that was in force."""
    asked_for: int
    """Number of the generation that was asked for, or else of the record in force."""


@dataclass(frozen=True)
class Succession:
    """What a generation begins with, and which members go before it."""

    base: Cursor | None = None
    """Where all go on from; None if no member holds a state, so that all load the last checkpoint or begin anew."""
    source: Peer | None = None
    """The member from which the others take over what they missed."""
    going: Sequence[Peer] = ()


def succession(answered: Sequence[Peer], *, joining: bool) -> Succession:
    """What follows from these answers.

    Args:
        answered: all members.
        joining: whether a process waits to be let in, or may come back.
    """
    # A member that has just healed by replay was not compared with any other yet, so it can't be a base.
    healed = [p for p in answered if p.healed and not p.fresh]
    if not healed:
        return Succession(None, None, [p for p in answered if p.phase is not Phase.IN])
    base = max(healed, key=lambda p: p.cursor.step).cursor
    holders = [p for p in healed if p.cursor.step == base.step]
    lasting = [p for p in holders if p.phase is Phase.IN]
    # If one member alone holds the base step, it stays for one more generation, and the others take the step over.
    source = min(lasting or holders, key=lambda p: p.member.slot)
    heirs = any(p.phase is Phase.IN for p in answered)
    if source.phase is Phase.LEAVING:  # It also waits until joining processes hold what it holds.
        heirs = heirs or joining
    if not lasting and not heirs:
        return Succession(base, source, list(answered))
    return Succession(base, source, [p for p in answered if p.phase is not Phase.IN and p is not source])


class Lag(NamedTuple):
    """Uids of the members that do not hold the base yet."""

    behind: tuple[str, ...]
    """They take over the sums of the one step they miss."""
    unhealed: tuple[str, ...]
    """They load a snapshot first, with a share of 0."""
    fresh: tuple[str, ...]
    """They compare themselves with the source first."""


def lag(peers: Sequence[Peer], base: Cursor) -> Lag:
    """What each misses of the base.

    Sets ``healed`` to False for members that miss more than kept sums can give.
    """
    behind, unhealed, fresh = [], [], []
    for peer in peers:
        missed = base.step - peer.cursor.step
        if not peer.healed or missed > 1 or (peer.fresh and missed):
            peer.healed = False
            unhealed.append(peer.member.uid)
        elif missed == 1:
            behind.append(peer.member.uid)
        elif peer.fresh:
            fresh.append(peer.member.uid)
    return Lag(tuple(behind), tuple(unhealed), tuple(fresh))
