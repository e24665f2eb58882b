"""The members that the actor knows, where each stands, and what the next generation may begin with."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.record import Member
from raytrain_het.membership.whereabouts import Place


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


@dataclass
class Peer:
    """A process that is connected to the hub."""

    member: Member
    phase: Phase
    heard: float
    """When it last said something."""
    cursor: Cursor = Cursor()
    healed: bool = False
    fresh: bool = False
    """Cursor, healed and fresh are as in :class:`Standing`."""
    first_base: int = -1
    reports_after: int = -1
    """It takes no part in reports of steps up to this one: it was not there yet."""
    answered: bool = False
    """Whether it has answered to the generation being formed."""
    reached: int = 0
    """Steps it has committed, as it told in passing: for people and for the count of deaths, never for a base."""
    position: int = 0
    """How far into the protocol it is, for telling who holds up the others."""
    place: Place = field(default_factory=Place)
    """What its training function is at, as it answered last."""
    place_since: float = 0.0
    """When it was first heard to be there."""
    place_heard: float = -math.inf
    """When it last said so."""
    left_out: float | None = None
    """The norm of what its codec has left out, as it told in passing: for people."""
    confirmed: bool = False
    returning: bool = False
    """Its function has returned, and its reports wait for the others, which may wait for its next step."""
    batch: list[int] | None = None

    @property
    def holds_state(self) -> bool:
        """Whether it holds the run's state, and this is certain."""
        return self.healed and not self.fresh

    def stands(self, standing: Standing) -> None:
        """It has said where it stands."""
        self.cursor, self.healed, self.fresh = standing.cursor, standing.healed, standing.fresh

    def is_at(self, place: Place, position: int, now: float) -> None:
        """It has answered from there."""
        if (place, position) != (self.place, self.position) or self.place_heard == -math.inf:
            self.place_since = now
        self.place, self.position, self.place_heard = place, position, now


@dataclass(frozen=True)
class Succession:
    """What a generation begins with, and who goes before it."""

    base: Cursor | None = None
    """None where nobody holds a state: all start from the last checkpoint, or anew."""
    source: Peer | None = None
    """From whom the others take over what they missed."""
    going: Sequence[Peer] = ()


def succession(answered: Sequence[Peer], *, joining: bool) -> Succession:
    """Who and what goes on after these answers; ``joining``: somebody is on its way in."""
    # Who has only just healed by replay has not been checked against anybody yet, so it can't be a base.
    healed = [p for p in answered if p.healed and not p.fresh]
    if not healed:
        return Succession(None, None, [p for p in answered if p.phase is not Phase.IN])
    base = max(healed, key=lambda p: p.cursor.step).cursor
    holders = [p for p in healed if p.cursor.step == base.step]
    lasting = [p for p in holders if p.phase is Phase.IN]
    # Who alone holds the base step stays one generation longer, so that the others can take it over.
    source = min(lasting or holders, key=lambda p: p.member.slot)
    heirs = any(p.phase is Phase.IN for p in answered)
    if source.phase is Phase.LEAVING:  # It also waits until those on their way in hold what it holds.
        heirs = heirs or joining
    if not lasting and not heirs:
        return Succession(base, source, list(answered))
    return Succession(base, source, [p for p in answered if p.phase is not Phase.IN and p is not source])


class Lag(NamedTuple):
    """Ids of the members that are not yet as the others."""

    behind: tuple[str, ...]
    """They take over the sums of the one step they miss."""
    unhealed: tuple[str, ...]
    """They load a snapshot first, with a share of 0."""
    fresh: tuple[str, ...]
    """They compare themselves with the source first."""


def lag(peers: Sequence[Peer], base: Cursor) -> Lag:
    """What each misses of the base.

    Sets ``healed`` to False for whoever misses more than kept sums can give.
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
