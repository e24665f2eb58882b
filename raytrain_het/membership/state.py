"""The membership actor's logic: a pure state machine, without sockets, threads or clocks.

Calls go in (a message of a member, a closed connection, Ray's word, the time); messages to members come out of
:meth:`Membership.drain`. Its interleavings are enumerated in ``tests/unit/test_membership_interleavings.py``.

A generation is formed in one of two ways. A *void* is for a failure: all answer at once, and what the old generation
had under way is dropped. A *want* is for a change that can wait for the end of the step: members pass it on in their
step headers, commit, and then answer. Either way the new record is issued when every member of the last one has
answered or is gone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from raytrain_het.balance.scoreboard import Table
from raytrain_het.errors import ConfigError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.deaths import MAX_FRUITLESS_DEATHS, MAX_FRUITLESS_GENERATIONS, Deaths
from raytrain_het.membership.event_log import EventLog
from raytrain_het.membership.peers import Peer, Phase, Succession, lag, succession
from raytrain_het.membership.protocol import (
    Address,
    Bye,
    End,
    Evicted,
    Fail,
    Formed,
    Mismatch,
    Patience,
    Ping,
    Poison,
    ToMember,
    Void,
    Want,
)
from raytrain_het.membership.record import Member, Record
from raytrain_het.membership.settings import HubSettings
from raytrain_het.membership.standstill import (
    ASK_AGAIN_S,
    TELL_AFTER_S,
    TYPICAL_STEPS,
    deadlocked,
    is_innocent,
    longest_wait,
    somebody_waits,
    to_blame,
    where_all_are,
)
from raytrain_het.membership.suspicion import Suspicion
from raytrain_het.membership.tables import (
    codecs_of,
    hierarchy_of,
    lr_scales_of,
    owners_of,
    shares_of,
    speeds_of,
    table_of,
)
from raytrain_het.membership.whereabouts import Place

MAX_GONE = 1000
"""So many of the members that were let go are remembered, to be told so should they come back."""
RECOVERY_GRACE_S = 10.0
"""How long a restarted actor waits for the members of the highest record."""


class Membership:
    """See the module's text. Times are seconds of a clock that does not count the caller's own standstills."""

    def __init__(self, settings: HubSettings, *, incarnation: int) -> None:
        self.settings = settings
        self.incarnation = incarnation
        self.under_way: Callable[[], bool] = lambda: False
        """Whether something is done that members may wait for and that none of their training functions does: a
        checkpoint is written, or a report registered."""
        self.disturbed = False
        """Whether anything has happened in this run after which workers' own counts of steps may differ."""
        self.table_for: Callable[[list[int]], Table | None] = lambda slots: None
        """A table for these slots; None where that in force fits them, or too little is known."""
        self.peers: dict[str, Peer] = {}
        self.record: Record | None = None
        self.number = 0
        self.voided = False
        self.failure: str | None = None
        self.log = EventLog(first_seq=incarnation // 1_000_000)
        self.table: Table | None = None
        """What shares and scales follow, once speeds are known."""
        self.vacant: set[int] = set()
        self.dead_slots: set[int] = set()
        self.finished_slots: set[int] = set()
        self.num_joined: Counter[int] = Counter()
        """By slot: how many processes have come."""
        self.checkpoint = settings.checkpoint
        self.checkpoint_cursor: Cursor = settings.checkpoint_cursor or Cursor()
        self._outbox: list[tuple[str, ToMember]] = []
        self._gone: dict[str, str] = {}
        self._deaths = Deaths()
        self._suspicion = Suspicion(settings)
        self._table_kept: str | None = None
        self._forming_since = 0.0
        self._want_answered = False
        self._first_hello: float | None = None
        self._recovering: Record | None = None
        self._recovery_needs_void = False
        self._fingerprint: tuple[str, int] | None = None
        self._reason = ""
        self._asked_at = self._told_at = 0.0
        self._told_of: tuple[tuple[int, str], ...] = ()
        self._step_s = 0.0

    # ---------------------------------------------------------------- what the caller reads

    def drain(self) -> list[tuple[str, ToMember]]:
        """Messages to send, as (uid, message), in order."""
        out, self._outbox = self._outbox, []
        return out

    @property
    def forming(self) -> bool:
        """Whether a generation is being formed."""
        return self.record is not None and self.number > self.record.number

    @property
    def recovering(self) -> bool:
        """Whether members that knew this actor's predecessor are awaited."""
        return self._recovering is not None

    @property
    def over(self) -> bool:
        """Whether the run has ended in good order."""
        return bool(self.finished_slots) and not any(p.phase is not Phase.JOINING for p in self.peers.values())

    @property
    def state(self) -> str:
        """One word for people: forming, running, ended or failed."""
        if self.failure is not None:
            return "failed"
        if self.over:
            return "ended"
        return "forming" if self.record is None or self.forming else "running"

    @property
    def life(self) -> int:
        """Which of the run's lives this is, see :class:`Record`."""
        record = self.record or self._recovering
        return record.life if record else 0

    # ---------------------------------------------------------------- members come and go

    def hello(
        self,
        member: Member,
        *,
        cursor: Cursor,
        healed: bool,
        now: float,
        fresh: bool = False,
        record: Record | None = None,
        answered: int = 0,
        fingerprint: str = "",
    ) -> None:
        """A worker has connected, for the first time or again after this actor was restarted."""
        uid = member.uid
        if uid in self._gone:
            self._send(uid, Evicted(reason=self._gone[uid]))
            return
        if self.failure is not None:
            self._send(uid, Fail(message=self.failure))
            return
        for other in [p for p in self.peers.values() if p.member.slot == member.slot and p.member.uid != uid]:
            self._lose(other.member.uid, "its slot was taken by a new process", now, died=True)
        if self.over and record is None:
            self._send(uid, End())
            return
        if self._refuse_other_model(member, fingerprint, now):
            return
        self.vacant.discard(member.slot)
        if self._first_hello is None:
            self._first_hello = now
        peer = Peer(member=member, phase=Phase.JOINING, cursor=cursor, healed=healed, fresh=fresh, heard=now)
        self.peers[uid] = peer
        self.num_joined[member.slot] += 1
        if record is not None:
            self._hello_from_before(peer, record, answered, now)
            return
        self._log("joined", now, slot=member.slot, uid=uid, device=member.device, host=member.host)
        if self._recovering is not None:
            self._recover_if_complete(now)
        elif self.record is None:
            self._start_if_all_are_there(now)
        elif not self.forming:
            self._start_forming(void=False, reason=f"slot {member.slot} joins", now=now)
        else:
            self._form_if_answered(now)

    def closed(self, uid: str, now: float, reason: str = "its connection closed") -> None:
        """A member's connection has closed: the process is dead, unless it was let go before."""
        if uid in self.peers:
            self._lose(uid, reason, now, died=True)

    def slot_lost(self, slot: int, reason: str, now: float) -> None:
        """Ray's word that the worker in a slot is dead."""
        for peer in [p for p in self.peers.values() if p.member.slot == slot]:
            self._lose(peer.member.uid, reason, now, died=True)
        if self._recovering is not None:
            self._recover_if_complete(now)

    def slot_vacant(self, slot: int, reason: str, now: float) -> None:
        """Nobody will come for this slot for now."""
        if slot not in self.vacant:
            self.vacant.add(slot)
            self._log("vacant", now, slot=slot, reason=reason)
            if self.record is None and self._recovering is None:
                self._start_if_all_are_there(now)

    # ---------------------------------------------------------------- what members say

    def answer(
        self,
        uid: str,
        number: int,
        *,
        cursor: Cursor,
        healed: bool,
        now: float,
        fresh: bool = False,
        batch: list[int] | None = None,
    ) -> None:
        """A member has stopped committing for the old generation, and says where it stands."""
        peer = self._heard(uid, now)
        if peer is None or self.record is None or number <= self.record.number:
            return
        if number > self.number:
            # Peers of a restarted actor may know of a number that it never announced.
            self._start_forming(void=False, reason="a member asks for it", now=now, number=number)
        peer.cursor, peer.healed, peer.fresh, peer.batch = cursor, healed, fresh, batch
        peer.answered = True
        self._form_if_answered(now)

    def failed(self, uid: str, generation: int, reason: str, now: float) -> None:
        """A member's collective has failed."""
        if self._heard(uid, now) is None:
            return
        if self._recovering is not None:
            self._recovery_needs_void = True
        elif self.record is not None and generation == self.record.number:
            self._start_forming(void=True, reason=f"a collective failed: {reason}", now=now)

    def suspect(self, uid: str, generation: int, step: int, now: float) -> None:
        """A member has waited past its deadline. Only a suspicion: everybody is pinged."""
        if self._heard(uid, now) is None or self.record is None or generation != self.record.number or self.voided:
            return
        if self._go_on_without_the_finished(now):
            return
        if self._suspicion.suspect(uid, generation, step, now):
            self._ping(now)

    def _go_on_without_the_finished(self, now: float) -> bool:
        """The others wait for a member whose function has returned: whether there is one."""
        assert self.record is not None
        there = [self.peers.get(m.uid) for m in self.record.members]
        if not any(p is None or p.phase is Phase.FINISHED or p.returning for p in there):
            return False
        # Once for who is returning: the new base confirms the step that its reports are of.
        for peer in self.peers.values():
            peer.returning = False
        self._start_forming(void=True, reason="a member has finished and the others go on", now=now)
        return True

    def waiting(self, uid: str, now: float) -> None:
        """A member waits for others outside of a collective: are they all alive?"""
        if self._heard(uid, now) is not None and self.record is not None and self._suspicion.begin(now):
            self._ping(now)

    def pong(self, uid: str, position: int, now: float, place: Place | None = None) -> None:
        """A member has answered a ping: how far it is in its collectives, and what its training function is at."""
        peer = self._heard(uid, now)
        if peer is not None:
            peer.is_at(place or Place(), position, now)
            self._settle_suspicion(now)
            self._look_for_a_standstill(now)

    def healed(self, uid: str, now: float) -> None:
        """An unhealed member has caught up and wants a share."""
        peer = self._heard(uid, now)
        if peer is not None:
            peer.healed = peer.fresh = True
            if not self.forming:
                self._start_forming(void=False, reason=f"slot {peer.member.slot} is healed", now=now)

    def verified(self, uid: str, now: float) -> None:
        """A healed member has compared itself with the others: it holds what they hold.

        Once all have, a generation follows that calls nobody fresh: by the record members see who may hold checkpoints,
        whether the source must serve those that heal, and the caller, whether shares may follow speeds again.
        """
        peer = self._heard(uid, now)
        if peer is not None:
            peer.fresh = False
            self._form_if_all_have_verified(now)

    def progress(self, uid: str, step: int, now: float, left_out: float | None = None, step_s: float = 0.0) -> None:
        """A member has committed a step, a typical one takes it so long, and its codec has left out gradients of such a
        norm; told from time to time only."""
        peer = self._heard(uid, now)
        if peer is not None:
            peer.reached, peer.left_out = max(peer.reached, step), left_out
            self._step_s = step_s
        if peer is not None and step > max(peer.first_base, 0) and peer.first_base >= 0:
            self._deaths.commit(peer.member.slot)

    def follow(self, table: Table, now: float) -> None:
        """Shares and scales come from this table from the next generation on."""
        self.table = table
        self._log("table", now, **table.to_json())
        if not self.forming:
            self._start_forming(void=False, reason=f"table {table.version}", now=now)

    def keep_table(self, reason: str, now: float) -> None:
        """No other table could be made: that in force stays. Told once."""
        if reason != self._table_kept:
            self._table_kept = reason
            self._log("table_kept", now, reason=reason)

    def leave(self, uid: str, now: float) -> None:
        """A member wants to go, in good order."""
        peer = self._heard(uid, now)
        if peer is None:
            return
        if peer.phase is Phase.JOINING:
            self._release(uid, "left", now)
            return
        peer.phase = Phase.LEAVING
        if not self.forming:
            self._start_forming(void=False, reason=f"slot {peer.member.slot} leaves", now=now)

    def finish(self, uid: str, *, cursor: Cursor, confirmed: bool, now: float) -> None:
        """A member's training function has come to its end."""
        peer = self._heard(uid, now)
        if peer is None:
            return
        if peer.phase is Phase.JOINING:
            self._release(uid, "left", now)
            return
        peer.phase, peer.cursor, peer.confirmed = Phase.FINISHED, cursor, confirmed
        self._release_the_finished(now)

    def returning(self, uid: str, now: float) -> None:
        """A member's training function has returned; it will have finished when its reports are acknowledged."""
        peer = self._heard(uid, now)
        if peer is not None:
            peer.returning = True

    def raised(self, uid: str, error: str, now: float) -> None:
        """A training function has raised: no generation follows."""
        peer = self._heard(uid, now)
        if peer is None or self.failure is not None:
            return
        self._log("raised", now, slot=peer.member.slot, uid=uid, error=(error.strip().splitlines() or [""])[-1])
        self.peers.pop(uid)
        self._forget(uid, "its training function raised")
        self._fail(f"the training function of worker {peer.member.slot} raised:\n{error}", now)

    def replicas_differ(self, message: str, now: float) -> None:
        """Members have looked at their replicas and found that they are not the same: the run ends."""
        if self.failure is None:
            self.failure = message
            self._log("failed", now, message=message)
            for uid in self.peers:
                self._send(uid, Mismatch(message=message))

    def broken(self, error: str, now: float, about: str = "") -> None:
        """The caller has come upon an error in here, or around it: the run ends, as nobody knows what was half done."""
        if self.failure is None:
            self._fail(f"the membership actor failed{about} ({error}); its log has the traceback.", now)

    def misused(self, message: str, now: float) -> None:
        """The training function does what cannot be right: the run ends before it has trained on."""
        if self.failure is None and self.record is not None:
            self._fail(message, now)

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self.failure is not None:
            return
        if self.record is None and self._first_hello is not None:
            waited = now - self._first_hello
            if self._recovering is not None:
                if waited >= RECOVERY_GRACE_S:
                    self._recover(now)
            elif waited >= self.settings.start_timeout_s:
                self._issue_first(now, f"{self.settings.start_timeout_s:g} s have passed")
        for peer in self._suspicion.dead(self._required(), now):
            silence = f"silent for {self.settings.silence_s:g} s while its peers waited"
            self._lose(peer.member.uid, silence, now, died=False)
        if self._answers_are_due(now):
            missing = [p for p in self._required() if not p.answered]
            if missing and now - self._forming_since >= self.settings.hang_limit_s:
                for peer in missing:
                    self._lose(peer.member.uid, "it did not answer within the hang limit", now, died=False)
            elif missing and self._suspicion.begin(now):
                self._ping(now)
        if now - self._asked_at >= ASK_AGAIN_S and somebody_waits(self._partners()):
            self._ping(now)

    # ---------------------------------------------------------------- forming

    def _answers_are_due(self, now: float) -> bool:
        """Whether members wait for each other's answers: in a void all do, after a want those that have answered.

        Such a wait is seen here alone, for no collective is under way that could be suspected.
        """
        if not self.forming:
            return False
        if not self.voided and not self._want_answered and any(p.answered for p in self._required()):
            self._want_answered, self._forming_since = True, now
        return self.voided or self._want_answered

    def _required(self) -> list[Peer]:
        return [p for p in self.peers.values() if p.phase is not Phase.JOINING]

    def _start_forming(self, *, void: bool, reason: str, now: float, number: int | None = None) -> None:
        if self.failure is not None or self.record is None:
            return
        if self.forming:
            if void and not self.voided:
                # A want that somebody may never reach, now that the step has failed.
                self.voided, self._forming_since = True, now
                self._announce(Void(number=self.number))
            self._form_if_answered(now)
            return
        self.number = max(self.number + 1, number or 0)
        self.voided, self._forming_since, self._reason, self._want_answered = void, now, reason, False
        for peer in self.peers.values():
            peer.answered = False
        if void and self._deaths.lose_generation():
            self._fail(
                f"{MAX_FRUITLESS_GENERATIONS} generations in a row failed without a death or a commit ({reason}). "
                "A link between two workers must be broken: check that all nodes reach each other on all ports.",
                now,
            )
            return
        self.disturbed |= void
        self._log("void" if void else "wanted", now, number=self.number, reason=reason)
        self._announce(Void(number=self.number) if void else Want(number=self.number))
        self._form_if_answered(now)

    def _form_if_all_have_verified(self, now: float) -> None:
        record = self.record
        if record is None or not record.fresh or self.forming:
            return
        # A new generation would make those that heal ask for another snapshot, and one follows anyway when they have.
        if not record.unhealed and not any(self.peers[u].fresh for u in record.fresh if u in self.peers):
            slots = ", ".join(str(record.member(uid).slot) for uid in record.fresh)
            self._start_forming(void=False, reason=f"slot {slots} is as the others", now=now)

    def _announce(self, message: ToMember) -> None:
        for peer in self._required():
            self._send(peer.member.uid, message)

    def _form_if_answered(self, now: float) -> None:
        if not self.forming or self.failure is not None:
            return
        required = self._required()
        if all(p.answered for p in required):
            self._issue(required, now)

    def _issue(self, answered: list[Peer], now: float) -> None:
        assert self.record is not None
        after = succession(answered, joining=any(p.phase is Phase.JOINING for p in self.peers.values()))
        staying = [p for p in answered if p not in after.going]
        for peer in after.going:
            how = "finished" if peer.phase is Phase.FINISHED else "left"
            self._release(peer.member.uid, how, now, heir=self._heir(peer, staying, after.base))
        self._publish(staying, after, now)
        source = after.source
        if source is not None and source.phase is not Phase.IN and source.member.uid in self.peers:
            self._start_forming(void=False, reason=f"slot {source.member.slot} leaves", now=now)

    def _heir(self, leaver: Peer, staying: Sequence[Peer], base: Cursor | None) -> Member | None:
        """Who takes over what a member that leaves has left to send: of those with a share, as they have something to
        send. Nobody where that member has not seen the last step through, and does not know what of it was sent."""
        assert self.record is not None
        shares = {m.uid: share for m, share in zip(self.record.members, self.record.shares, strict=True)}
        heirs = [p.member for p in staying if p.phase is Phase.IN and p.healed and not p.fresh]
        heirs.sort(key=lambda m: (shares.get(m.uid, 0) == 0, m.slot))
        return heirs[0] if heirs and leaver.cursor == base else None

    def _publish(self, staying: list[Peer], after: Succession, now: float) -> None:
        """Issue the record of a new generation: ``staying`` and all that are joining."""
        previous = self.record
        joining = [p for p in self.peers.values() if p.phase is Phase.JOINING]
        peers = sorted(staying + joining, key=lambda p: p.member.slot)
        if not peers:
            self._count_deaths(self._deaths.last_step(), peers, now)
            self._end_or_wait(now)
            return
        base, source = after.base, after.source
        # Where all start again, nobody is left to say in which step the last ones died.
        died_after = self._deaths.last_step() if base is None else base.step
        if reset := base is None:
            base = self.checkpoint_cursor if self.checkpoint else Cursor()
            source = peers[0]
            for peer in peers:
                peer.healed, peer.fresh, peer.cursor = True, False, base
        assert base is not None and source is not None
        behind, unhealed, fresh = lag(peers, base)
        self.disturbed |= bool(unhealed)
        self._count_deaths(died_after, peers, now)
        if self.failure is not None:
            return
        self._fit_table(peers, now)
        members = tuple(p.member for p in peers)
        same = previous is not None and not self.voided and not reset and previous.members == members
        group = previous.group if same and previous is not None else f"{self.incarnation}.{self.number}"
        if previous is not None and base.step > previous.base:
            self._deaths.links_hold()
        speeds = speeds_of(self.table, peers)
        self.record = Record(
            number=self.number,
            incarnation=self.incarnation,
            group=group,
            life=self.incarnation // 1_000_000 + self.number if reset or previous is None else previous.life,
            members=members,
            shares=shares_of(self.table, self.settings.shares, peers),
            lr_scales=lr_scales_of(self.table, peers),
            normalised=self.settings.lr_scale_normalisation == "mean",
            table=self.table.version if self.table else 0,
            speeds=speeds,
            owners=owners_of(self.table, speeds, peers),
            codecs=codecs_of(self.table, self.settings.codecs, peers),
            hierarchy=hierarchy_of(self.table, self.settings.hierarchy),
            cursor=base,
            source=source.member.uid,
            behind=behind,
            unhealed=unhealed,
            fresh=fresh,
            reset=reset,
            checkpoint=self.checkpoint if reset else None,
            backend=self.settings.backend,
            reason=self._reason,
        )
        self._tell_members(self.record, peers, now)

    def _tell_members(self, record: Record, peers: list[Peer], now: float) -> None:
        """Of their generation."""
        self._log(
            "formed",
            now,
            number=record.number,
            base=record.base,
            slots=[p.member.slot for p in peers],
            unhealed=[p.member.slot for p in peers if not p.healed],
            reason=record.reason,
            reset=record.reset,
            table=record.table,
            owners=[round(part, 4) for part in record.owners],
        )
        for peer in peers:
            if peer.phase is Phase.JOINING:
                peer.phase = Phase.IN
            if peer.healed and (peer.first_base < 0 or peer.fresh):
                peer.first_base = record.base
                # Whoever starts anew may report before its first step; whoever heals comes after that.
                peer.reports_after = record.base - record.reset
            peer.answered = False
            self._send(peer.member.uid, Formed(record=record))
        self.voided = False
        self._suspicion.forget()
        self._release_the_finished(now)

    def _fit_table(self, peers: list[Peer], now: float) -> None:
        """Who has come, perhaps with other hardware than its predecessor, gets a share of its own."""
        if self.table is None:
            return
        try:
            table = self.table_for([p.member.slot for p in peers if p.healed])
        except (ConfigError, ValueError) as error:
            self.keep_table(str(error), now)
            return
        if table is not None:
            self.table = table
            self._log("table", now, **table.to_json())

    def _start_if_all_are_there(self, now: float) -> None:
        joined = {p.member.slot for p in self.peers.values()}
        if joined and joined | self.vacant | self.dead_slots >= set(range(self.settings.num_slots)):
            self._issue_first(now, "the run starts")

    def _issue_first(self, now: float, reason: str) -> None:
        if self.table is None:
            try:
                self.table = self.table_for(sorted(p.member.slot for p in self.peers.values()))
            except (ConfigError, ValueError) as error:
                self._fail(str(error), now)
                return
            if self.table is not None:
                self._log("table", now, **self.table.to_json())
        self.number += 1
        self._reason = reason
        self._publish([], Succession(), now)

    def _end_or_wait(self, now: float) -> None:
        """Nobody is left: either the run has ended, or the slots' next workers start from the last checkpoint."""
        if not self.finished_slots:
            self.record, self.voided, self._first_hello = None, False, None
            self._log("empty", now)

    # ---------------------------------------------------------------- leaving, dying, ending

    def _release(self, uid: str, how: str, now: float, heir: Member | None = None) -> None:
        peer = self.peers.pop(uid)
        self._forget(uid, f"it had {how}")
        if how == "finished":
            self.finished_slots.add(peer.member.slot)
        self._log(how, now, slot=peer.member.slot, uid=uid, step=peer.cursor.step)
        whom = Address(host=heir.host, port=heir.state_port) if heir is not None else None
        self._send(uid, Bye(how=how, heir=whom))
        self._end_if_nobody_trains()

    def _end_if_nobody_trains(self) -> bool:
        """The run has ended once some have finished and all others are only on their way in."""
        holding = [p for p in self.peers.values() if p.phase is not Phase.JOINING and p.healed and not p.fresh]
        if not self.finished_slots or holding:
            return False
        for uid in list(self.peers):
            self._send(uid, End())
            self.peers.pop(uid)
        return True

    def _release_the_finished(self, now: float) -> None:
        if self._recovering is not None:
            return  # Who else is there, and needs them, is not known yet.
        finished, record = [p for p in self.peers.values() if p.phase is Phase.FINISHED], self.record
        if record is not None and any(p.cursor.step > record.base for p in finished):
            # A step takes all members: whoever had to load or compare first has done so, though its word is under way.
            for uid, peer in self.peers.items():
                if record.rank_of(uid) is not None and uid not in record.unhealed:
                    peer.healed, peer.fresh = True, False
        active = [p for p in self.peers.values() if p.phase in (Phase.IN, Phase.LEAVING) and p.healed and not p.fresh]
        for peer in finished:
            step = peer.cursor.step
            held_by_others = all(p.cursor.step >= step for p in finished) and not active
            # Who goes by the record's base does not know of those who have yet to take it over: who are behind, or load
            # what all begin with.
            needed = record is not None and bool(record.behind or record.reset) and step == record.base
            confirmed = peer.confirmed and not needed
            if confirmed or held_by_others:
                self._release(peer.member.uid, "finished", now)
        self._form_if_answered(now)

    def _lose(self, uid: str, reason: str, now: float, *, died: bool) -> None:
        peer = self.peers.pop(uid, None)
        if peer is None:
            return
        self._forget(uid, reason)
        slot = peer.member.slot
        expected = {"expected": True} if self.failure is not None else {}
        gone_with_it = {"left_out": peer.left_out} if peer.left_out else {}
        self._log("lost" if died else "evicted", now, slot=slot, uid=uid, reason=reason, **expected, **gone_with_it)
        if not died:
            self._send(uid, Evicted(reason=reason))
        if self.failure is not None:
            return
        if self._deaths.lose_slot(slot):
            self.dead_slots.add(slot)
            self._log("given_up", now, slot=slot, reason=f"it died {MAX_FRUITLESS_DEATHS} times without a commit")
        if self._recovering is not None:
            self._recover_if_complete(now)
        elif self.record is None:
            self._start_if_all_are_there(now)
        elif peer.phase is Phase.JOINING:
            self._form_if_answered(now)
        else:
            if died and peer.healed and peer.phase is Phase.IN:
                self._deaths.lose_member(peer)
            self._deaths.links_hold()
            if self._end_if_nobody_trains():
                return
            self._reason = f"slot {slot} was lost: {reason}"
            self._release_the_finished(now)
            if self.record is not None and self.record.rank_of(uid) is not None:
                self._start_forming(void=True, reason=f"slot {slot} was lost: {reason}", now=now)

    def _count_deaths(self, base: int, peers: list[Peer], now: float) -> None:
        """A generation is formed on this base: a step that has cost too many of them a member fails the run.

        Some sample of it must be poison.
        """
        lost = self._deaths.form_generation(base)
        if not lost:
            return
        assert self.record is not None
        slots = sorted({p.member.slot for p in lost})
        ranks = [r for r, m in enumerate(self.record.members) if m.uid in {p.member.uid for p in lost}]
        batch = next((p.batch for p in peers if p.batch), None)
        where = f" (epoch {batch[0]}, positions {batch[1]} to {batch[1] + batch[2]} of its order)" if batch else ""
        self._fail(
            f"Workers died {MAX_FRUITLESS_DEATHS} times in step {base + 1}{where}, the last in slots {slots}. "
            "Some sample of that step probably kills the process: train without it, or look at the workers' logs.",
            now,
            poison=Poison(step=base + 1, slots=slots, ranks=ranks, shares=self.record.shares),
        )

    def _fail(self, message: str, now: float, poison: Poison | None = None) -> None:
        self.failure = message
        self._log("failed", now, message=message)
        for uid in self.peers:
            self._send(uid, Fail(message=message, poison=poison))

    # ---------------------------------------------------------------- suspicion

    def _ping(self, now: float) -> None:
        self._asked_at = now
        for peer in self._required():
            self._send(peer.member.uid, Ping())

    def _partners(self) -> list[Peer]:
        """Who takes part in steps and reports, or has done so to the end."""
        return [p for p in self._required() if p.healed and not p.fresh]

    def _settle_suspicion(self, now: float) -> None:
        suspecting = self._suspicion.settled(self._required())
        if suspecting is None or self._drop_who_hangs(bool(suspecting), now):
            return
        for uid in sorted(suspecting):
            self._send(uid, Patience())

    def _drop_who_hangs(self, in_a_step: bool, now: float) -> bool:
        """Somebody has waited for the hang limit: drop who holds it up, but nobody who waits for others itself."""
        limit_s, since = self.settings.hang_limit_s, self._suspicion.since
        late = self._suspicion.late(self._required(), now) if in_a_step else []
        busy = [p for p in self._partners() if not p.place.waits]
        if not late:
            if longest_wait(self._partners(), now) < limit_s or self.under_way():
                return False
            late, since = busy, None
        elif all(map(is_innocent, late)):
            late = busy or late
        began = since[2] if since is not None else -math.inf
        # The ping that found it there came up to so much later.
        guilty = to_blame(late, began, limit_s - self.settings.silence_s, now)
        for peer in guilty:
            at = f"; it was {peer.place.text}" if peer.place.text else ""
            self._lose(peer.member.uid, f"its peers waited {limit_s:g} s for it{at}", now, died=False)
        if not guilty and all(map(is_innocent, late)) and not self.forming:
            self._fail(
                f"the workers have waited for {limit_s:g} s, and none of them is to blame: "
                f"{where_all_are(self._partners())}. If it may, raise HetConfig(hang_limit_s={limit_s:g}).",
                now,
            )
        return bool(guilty) or self.failure is not None

    def _look_for_a_standstill(self, now: float) -> None:
        partners = self._partners()
        if self.failure is not None or self.record is None or self.forming or not somebody_waits(partners):
            return
        if deadlocked(partners, now) and not self.under_way():
            if self._go_on_without_the_finished(now):
                return
            self._fail(
                f"every worker waits for another one, and none will go on: {where_all_are(partners)}. The training "
                "function must make the same calls (loader, report, evaluate) in the same order on every worker: look "
                "for what only some of them do, such as `if rank == 0:`.",
                now,
            )
            return
        waited_s = longest_wait(partners, now)
        busy = [p.member.slot for p in partners if not p.place.waits]
        told_of = tuple((p.member.slot, p.place.text) for p in partners)
        if waited_s < max(TELL_AFTER_S, TYPICAL_STEPS * self._step_s) or told_of == self._told_of:
            return
        if now - self._told_at < TELL_AFTER_S:
            return
        self._told_of, self._told_at = told_of, now
        self._log(
            "waiting",
            now,
            slots=busy,
            waited_s=round(waited_s, 1),
            reason=where_all_are(partners),
            limit_s=self.settings.hang_limit_s,
        )

    # ---------------------------------------------------------------- a restart of this actor

    def _hello_from_before(self, peer: Peer, record: Record, answered: int, now: float) -> None:
        """A member that knew this actor's predecessor."""
        if self.record is not None:
            self._lose(peer.member.uid, "it was away when the others went on", now, died=False)
            return
        peer.phase = Phase.IN
        self.number = max(self.number, record.number, answered)
        known = self._recovering
        if known is not None and known.number != record.number or answered > record.number:
            self._recovery_needs_void = True
        if known is None or record.number > known.number:
            self._recovering = record
        self._recover_if_complete(now)

    def _recover_if_complete(self, now: float) -> None:
        assert self._recovering is not None
        members = self._recovering.members
        known = {m.uid for m in members}
        # A new process in a member's slot says that the member is dead.
        taken = {p.member.slot for p in self.peers.values() if p.member.uid not in known}
        awaited = {m.uid for m in members if m.slot not in taken} - self._gone.keys()
        if awaited <= self.peers.keys():
            self._recover(now)

    def _recover(self, now: float) -> None:
        """Put the highest record in force again; form anew if anything happened to it meanwhile."""
        record, self._recovering = self._recovering, None
        assert record is not None
        highest, self.record, self.number = max(self.number, record.number), record, record.number
        self.table = table_of(record, codecs_chosen=self.settings.compression_error is not None)
        members = {m.uid for m in record.members}
        self._log("recovered", now, number=record.number)
        self.disturbed = True
        for peer in [p for p in self._required() if p.member.uid not in members]:
            self._lose(peer.member.uid, "it was not in the last record", now, died=False)
        if record.reset:  # As when it was issued: who was loading then tells nobody that it has done so.
            loading = members.difference(record.unhealed)
            for peer in [p for p in self._required() if p.member.uid in loading and not p.healed]:
                peer.healed, peer.fresh, peer.cursor = True, False, record.cursor
        if self._recovery_needs_void or members - self.peers.keys():
            reason = "the membership actor was restarted"
            self._start_forming(void=True, reason=reason, now=now, number=highest + 1)
        elif any(p.phase is Phase.JOINING or p.fresh and u in record.unhealed for u, p in self.peers.items()):
            self._start_forming(void=False, reason="workers have joined or healed", now=now, number=highest + 1)
        self._form_if_all_have_verified(now)
        self._release_the_finished(now)

    # ---------------------------------------------------------------- small things

    def _heard(self, uid: str, now: float) -> Peer | None:
        peer = self.peers.get(uid)
        if peer is not None:
            peer.heard = now
        return peer

    def _forget(self, uid: str, reason: str) -> None:
        self._gone[uid] = reason
        if len(self._gone) > MAX_GONE:
            del self._gone[next(iter(self._gone))]

    def _refuse_other_model(self, member: Member, fingerprint: str, now: float) -> bool:
        """Workers must train the same model on the same data.

        One that does not ends the run: nobody is to wait for it.
        """
        if not fingerprint:
            return False
        if self._fingerprint is None:
            self._fingerprint = (fingerprint, member.slot)
        if self._fingerprint[0] == fingerprint:
            return False
        message = (
            f"worker {member.slot} built another model or dataset than worker {self._fingerprint[1]}: "
            f"{fingerprint} against {self._fingerprint[0]}. Build the same on every worker, "
            "whatever its device, rank or random seed."
        )
        self._send(member.uid, Mismatch(message=message))
        self._fail(message, now)
        return True

    def _send(self, uid: str, message: ToMember) -> None:
        self._outbox.append((uid, message))

    def _log(self, kind: str, now: float, **values: Any) -> None:
        generation = self.record.number if self.record else 0
        self.log.note({"kind": kind, "generation": generation, **values})
