"""All that the membership logic knows of a run: one object, which the parts of the logic read and change.

Nothing here decides anything. The parts, in the order in which they build on each other:

- :mod:`~raytrain_het.membership.ending`: a member is let go, the run ends or fails;
- :mod:`~raytrain_het.membership.issuing`: from the members' answers to the next record;
- :mod:`~raytrain_het.membership.forming`: a generation is asked for, and issued once all have answered;
- :mod:`~raytrain_het.membership.suspending`: the others go on without a member that may come back;
- :mod:`~raytrain_het.membership.departures`: a member is lost, leaves, finishes or raises;
- :mod:`~raytrain_het.membership.recovery`: a restarted hub puts the newest record in force again;
- :mod:`~raytrain_het.membership.watching`: members wait for each other, and somebody is silent, slow or stuck;
- :mod:`~raytrain_het.membership.logic`: the class that hears messages and time, and calls these parts.

None of them has a socket, a thread or a clock: the time comes as ``now``, and messages go into ``outbox``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from raytrain_het.balance.scoreboard import Table
from raytrain_het.config import HetConfig
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.deaths import Deaths
from raytrain_het.membership.event_log import EventLog
from raytrain_het.membership.events import Event
from raytrain_het.membership.peers import Peer, Phase, Suspended
from raytrain_het.membership.protocol import ToMember
from raytrain_het.membership.record import Record
from raytrain_het.membership.run_context import RunContext
from raytrain_het.membership.suspicion import Suspicion


@dataclass
class NextGeneration:
    """The generation that is being formed, or else the one in force."""

    number: int = 0
    """Its number. While the record in force has this number, no generation is being formed."""
    voided: bool = False
    """Whether the one before it is void: nothing of that one's open step is committed."""
    reason: str = ""
    """Why it is formed, for people."""
    since: float = 0.0
    """Since when members wait for each other's answers."""
    some_have_answered: bool = False
    """Whether a member has answered to a want: it waits for the others from then on."""


@dataclass
class Restart:
    """What members say to a hub that has been restarted."""

    record: Record | None = None
    """The newest record that a member has shown; None unless members of an earlier hub are awaited."""
    needs_void: bool = False
    """Whether something happened meanwhile after which this record cannot stay in force."""


@dataclass
class Waits:
    """When members were last asked where they are, and what people were last told of it. Times in seconds."""

    asked_at: float = 0.0
    looked_at: float = -math.inf
    """When all members were last looked at."""
    asked_after_at: float = 0.0
    """When machines were last asked after members that are not connected."""
    logged_at: float = 0.0
    logged: tuple[tuple[int, str], ...] = ()
    """By slot, where each was."""
    step_s: float = 0.0
    """A typical step, as a member said last."""


@dataclass(kw_only=True)
class RunState:
    """A run as the hub sees it. Times are seconds of a clock that stands still while the hub cannot listen."""

    config: HetConfig
    context: RunContext
    incarnation: int
    """Which life of the hub this is; a later one has a larger number."""
    log: EventLog
    suspicion: Suspicion
    checkpoint: str | None
    """The newest checkpoint."""
    checkpoint_cursor: Cursor

    peers: dict[str, Peer] = field(default_factory=dict)
    """By uid: the processes that are connected, those that are joining included."""
    suspended: dict[str, Suspended] = field(default_factory=dict)
    """By uid: members without which the others go on, and that may come back."""
    gone: dict[str, ToMember] = field(default_factory=dict)
    """By uid: what a process was told when it was let go."""
    record: Record | None = None
    """The record in force."""
    next: NextGeneration = field(default_factory=NextGeneration)
    table: Table | None = None
    """What shares and gradient weights follow, once speeds are known."""
    table_kept: str | None = None
    """Why no other table could be made, as it was last logged."""
    failure: str | None = None
    """Why the run has failed."""
    failed_with: ToMember | None = None
    """What its members were told then."""
    complete: bool = False
    """Whether a member has come to the end of all epochs."""
    disturbed: bool = False
    """Whether anything has happened in this run after which workers' own counts of steps may differ."""

    vacant: set[int] = field(default_factory=set)
    """Slots in which no worker can be placed at the moment."""
    dead_slots: set[int] = field(default_factory=set)
    """Slots that were given up."""
    finished_slots: set[int] = field(default_factory=set)
    """Slots whose training function has come to its end."""
    num_joined: Counter[int] = field(default_factory=Counter)
    """By slot: how many processes have come."""

    first_hello: float | None = None
    """When the first worker came, since there was last a record."""
    fingerprint: tuple[str, int] | None = None
    """Of the model and the data, and the slot of the worker that said it first."""
    deaths: Deaths = field(default_factory=Deaths)
    restart: Restart = field(default_factory=Restart)
    waits: Waits = field(default_factory=Waits)
    outbox: list[tuple[str, ToMember]] = field(default_factory=list)
    """Messages to send, as (uid, message), in order."""

    under_way: Callable[[], bool] = lambda: False
    """Whether something is being done that members may wait for and that none of their training functions does: a
    checkpoint is written, or a report registered."""
    table_for: Callable[[list[int]], Table | None] = lambda slots: None
    """A table for these slots; None where the table in force fits them, or too little is known."""

    # ---------------------------------------------------------------- what follows from it

    @property
    def forming(self) -> bool:
        """Whether a generation is being formed."""
        return self.record is not None and self.next.number > self.record.number

    @property
    def recovering(self) -> bool:
        """Whether members that knew an earlier hub are awaited."""
        return self.restart.record is not None

    @property
    def over(self) -> bool:
        """Whether the run has ended in good order."""
        return bool(self.finished_slots) and not self.members() and not self.still_to_train()

    @property
    def phase(self) -> str:
        """One word for people: forming, running, ended or failed."""
        if self.failure is not None:
            return "failed"
        if self.over:
            return "ended"
        return "forming" if self.record is None or self.forming else "running"

    @property
    def life(self) -> int:
        """Which of the run's lives this is, see :class:`Record`."""
        record = self.record or self.restart.record
        return record.life if record else 0

    def members(self) -> list[Peer]:
        """All that a generation has let in, and that are connected: the next one waits for their answers."""
        return [p for p in self.peers.values() if p.phase is not Phase.JOINING]

    def joining(self) -> list[Peer]:
        """All that wait for a generation to let them in."""
        return [p for p in self.peers.values() if p.phase is Phase.JOINING]

    def finished(self) -> list[Peer]:
        """Members whose training function has come to its end, and that were not let go yet."""
        return [p for p in self.peers.values() if p.phase is Phase.FINISHED]

    def uids_in(self, slot: int) -> set[str]:
        """The processes in a slot, a suspended one included."""
        there = [*self.peers.values(), *(s.peer for s in self.suspended.values())]
        return {p.member.uid for p in there if p.member.slot == slot}

    def holders(self) -> list[Peer]:
        """Members that hold the run's state: they take part in steps and reports, or have done so to the end."""
        return [p for p in self.members() if p.holds_state]

    def still_to_train(self) -> list[Peer]:
        """Suspended members that hold a state of the run and have not come to its end, unless others have."""
        if self.complete:
            return []
        peers = [suspended.peer for suspended in self.suspended.values()]
        return [p for p in peers if p.holds_state and p.phase is not Phase.FINISHED]

    # ---------------------------------------------------------------- what every part does

    def heard(self, uid: str, now: float) -> Peer | None:
        """A member has said something; None if it is not known, or was let go."""
        peer = self.peers.get(uid)
        if peer is not None:
            peer.heard = now
        return peer

    def send(self, uid: str, message: ToMember) -> None:
        """Send a message to one process."""
        self.outbox.append((uid, message))

    def announce(self, message: ToMember) -> None:
        """Send a message to all members."""
        for peer in self.members():
            self.send(peer.member.uid, message)

    def note(self, event: Event) -> None:
        """Add to the run's log what happened to its members."""
        self.log.note(event, generation=self.record.number if self.record else 0)
