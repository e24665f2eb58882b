"""What the hub does with what members say: each message goes to the part of the hub that it concerns.

:class:`~raytrain_het.membership.server.Hub` reads messages and calls this from its one thread. There are no sockets in
here: messages to members go out through ``send``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from raytrain_het.config import HetConfig
from raytrain_het.membership import audit, events, protocol
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.evaluations import ChunkDealer
from raytrain_het.membership.last_groups import LastGroups
from raytrain_het.membership.logic import Membership
from raytrain_het.membership.pace import LARGE_FLEET
from raytrain_het.membership.peers import Phase, Standing
from raytrain_het.membership.place import Place
from raytrain_het.membership.record import Member
from raytrain_het.membership.reporting import Reporting
from raytrain_het.membership.run_context import RunContext
from raytrain_het.membership.status import RunStatus, status
from raytrain_het.membership.table_keeper import TableKeeper
from raytrain_het.membership.watchman import Life

Send = Callable[[str, protocol.Message], None]
"""Send a message to the member with this uid, if it is connected."""


_SELDOM_MATTERS = (
    protocol.Timing,
    protocol.Stats,
    protocol.Pong,
    protocol.Meet,
    protocol.Waiting,
    protocol.Suspect,
    protocol.Answer,
    protocol.Evaluate,
    protocol.Report,
)
"""Messages of which many come."""


class Switchboard:
    """The parts of one run's hub, and what each hears.

    Args:
        config: the run's settings.
        context: what else there is to know of the run.
        now: the hub's clock, seconds.
        send: sends a message to a member.
        connected: uids of all that are connected.
    """

    def __init__(
        self,
        config: HetConfig,
        context: RunContext,
        *,
        now: Callable[[], float],
        send: Send,
        connected: Callable[[], list[str]],
    ) -> None:
        self.core = Membership(config, context, incarnation=time.time_ns())
        self.tables = TableKeeper(config, self.core.run)
        self.core.run.table_for = self.tables.fitting
        self.reporting = Reporting(self.core, self.tables, send)
        self.core.run.under_way = self.reporting.is_under_way
        self._now, self._send, self._connected = now, send, connected
        self._evaluations = ChunkDealer()
        self._audits = audit.AuditCollector()
        self._meetings: LastGroups[protocol.Meet] = LastGroups()
        """What members have said to each other while they make a process group."""
        self._said: list[protocol.Meet] = []
        """Of a large fleet: what is to be passed on with the next tick."""
        self._stats: dict[int, tuple[str, protocol.Stats]] = {}
        """By slot: the uid of its worker, and what that has said last of itself."""
        self._next_event = self.core.run.log.next_seq
        self._slots_to_clear: set[int] = set()
        """Those whose machine will be taken away, until another worker comes to them."""
        self._asked_to_leave: set[str] = set()
        """Uids of the members that were asked to leave for that."""

    # ---------------------------------------------------------------- what the hub hears

    def hello(self, hello: protocol.Hello) -> None:
        """A member has connected."""
        member, known, run = hello.member, hello.known, self.core.run
        if known is not None:
            self.tables.introduce(member.slot, known)
        if not any(peer.member.slot == member.slot for peer in run.peers.values()):
            self._slots_to_clear.discard(member.slot)  # It is told again, if this one is on such a machine too.
        self.core.hello(
            member,
            Standing(cursor=hello.cursor, healed=hello.healed, fresh=hello.fresh),
            now=self._now(),
            record=hello.record,
            answered=hello.answered,
            want=hello.want,
            fingerprint=hello.fingerprint,
        )
        self.reporting.connected(member.slot)
        if hello.checkpoint and hello.checkpoint_cursor is not None:
            self._note_checkpoint(hello.checkpoint, hello.checkpoint_cursor)
        if run.checkpoint is not None:
            self._send(member.uid, self._newest_checkpoint())
        if said := [words for _, _, words in self._meetings]:
            self._send(member.uid, protocol.Meets(said=said))
        self.settle()

    def hear(self, member: Member, message: protocol.Message) -> None:
        """A member has said something.

        What most messages say changes nothing for reports. With many members it would cost too much to look after each:
        then what matters for open reports can wait for the next tick.
        """
        self._hear(member, message)
        open_reports = self.reporting.collector.has_open_reports and len(self.core.run.peers) <= LARGE_FLEET
        if open_reports or not isinstance(message, _SELDOM_MATTERS) or self._has_decided():
            self.settle()

    def _has_decided(self) -> bool:
        """Whether the logic has something to say, or has logged something."""
        return bool(self.core.run.outbox) or self.core.run.log.next_seq != self._next_event

    def _hear(self, member: Member, message: protocol.Message) -> None:
        self.core.heard_again(member.uid, self._now())
        if member.uid not in self.core.run.peers:
            return  # It was let go: what it still says belongs to a run that the others have left behind.
        self._hear_of_generations(member.uid, member.slot, message)

    def heard(self, uid: str) -> None:
        """Something has arrived from a member; what it is comes to :meth:`hear` in its turn."""
        self.core.run.heard(uid, self._now())

    def expects(self, uid: str) -> bool:
        """Whether this member was not let go: its connection should not have closed."""
        return uid in self.core.run.peers or uid in self.core.run.suspended

    def learn(self, member: Member, life: Life) -> None:
        """A member's machine has said how its process is."""
        match life:
            # Of another machine a refusal may be the word of a firewall, or of a gateway that does not reach it.
            case Life.REFUSED if member.host == self.core.run.context.host:
                self.core.dead(member.uid, "its process has ended", self._now())
            case Life.ENDED:
                self.core.dead(member.uid, "its process has ended", self._now())
            case Life.STOPPED:
                self.core.stopped(member.uid, self._now())
            case Life.RUNS:
                self.core.runs(member.uid, self._now())
        if self._has_decided():
            self.settle()

    def in_doubt(self) -> list[Member]:
        """Members to be asked after on their machines: those that leave a ping unanswered, and now and again those that
        are not connected, or suspended."""
        return self.core.in_doubt(self._now())

    def tick(self) -> None:
        """Time has passed."""
        self.core.tick(self._now())
        if self._said:
            together, self._said = protocol.Meets(said=self._said), []
            for uid in self._connected():
                self._send(uid, together)
        if self.reporting.collector.has_open_reports or self._has_decided():
            self.settle()

    def disconnected(self, uid: str) -> None:
        """A member's connection has closed."""
        self.core.disconnected(uid)

    def slot_lost(self, slot: int, reason: str) -> None:
        """Ray says that the worker in a slot is dead."""
        self.core.slot_lost(slot, reason, self._now())
        self.settle()

    def slot_drains(self, slot: int, reason: str) -> None:
        """The machine of a slot's worker will be taken away: the worker leaves in good order.

        It stays while no other one holds the state, on a machine that stays. So this is told again until it has left.
        """
        run = self.core.run
        self._slots_to_clear.add(slot)
        stay = [peer for peer in run.holders() if peer.member.slot not in self._slots_to_clear]
        for peer in [p for p in run.peers.values() if p.member.slot == slot and p.phase is not Phase.FINISHED]:
            uid = peer.member.uid
            if (stay or peer.phase is Phase.JOINING) and uid not in self._asked_to_leave:
                self._asked_to_leave.add(uid)
                run.note(events.Draining(slot=slot, uid=uid, reason=reason))
                self.reporting.let_leave_when_stored(uid, slot)
        self.settle()

    def slot_vacant(self, slot: int, reason: str) -> None:
        """No worker can be placed in this slot at the moment."""
        self.core.slot_vacant(slot, reason, self._now())
        self.settle()

    def acknowledge(self, keys: list[str]) -> None:
        """These reports are registered; the workers may forget them."""
        self.reporting.acknowledge(keys)
        self.settle()

    def status(self) -> RunStatus:
        """Who takes part, and how far they are."""
        return status(self.core.run, self.tables, self._stats)

    # ---------------------------------------------------------------- by what it concerns

    def _hear_of_generations(self, uid: str, slot: int, message: protocol.Message) -> None:
        core, now = self.core, self._now()
        match message:
            case protocol.Answer() as m:
                standing = Standing(cursor=m.cursor, healed=m.healed, fresh=m.fresh)
                core.answer(uid, m.number, standing, batch=m.batch, now=now)
            case protocol.Failed() as m:
                core.failed(uid, m.generation, m.reason, now)
            case protocol.Suspect() as m:
                core.suspect(uid, m.generation, m.step, now)
            case protocol.Waiting():
                core.waiting(uid, now)
            case protocol.Healed():
                core.healed(uid, now)
            case protocol.Verified():
                core.verified(uid, now)
            case protocol.Meet() as m:
                self._pass_on(uid, m)
            case _:
                self._hear_of_progress(uid, slot, message)

    def _hear_of_progress(self, uid: str, slot: int, message: protocol.Message) -> None:
        match message:
            case protocol.Pong() as m:
                self.core.pong(uid, m.position, self._now(), m.place or Place())
                self.reporting.collector.note_progress(slot, m.told)
            case protocol.Stats() as m:
                self.core.progress(uid, m.step, self._now(), m.left_out, m.step_s)
                self.reporting.collector.note_progress(slot, m.told)
                self._stats[slot] = uid, m
            case protocol.Timing() as m:
                self._hear_times(slot, m)
            case protocol.Event() as m:
                self.core.run.log.note(m.event, slot=slot)
            case _:
                self._hear_of_an_end(uid, slot, message)

    def _hear_of_an_end(self, uid: str, slot: int, message: protocol.Message) -> None:
        match message:
            case protocol.Leave():
                self.reporting.let_leave_when_stored(uid, slot)
            case protocol.Returning():
                self.core.returning(uid, self._now())
            case protocol.Finish() as m:
                complete = m.told is None or m.told.complete
                self.core.finish(uid, cursor=m.cursor, confirmed=m.confirmed, complete=complete, now=self._now())
                self.reporting.collector.note_progress(slot, m.told)
            case protocol.Raised() as m:
                self.core.raised(uid, m.error, self._now())
            case _:
                self._hear_of_results(uid, slot, message)

    def _hear_of_results(self, uid: str, slot: int, message: protocol.Message) -> None:
        match message:
            case protocol.Report() as m:
                self.reporting.add_part(uid, slot, m)
            case protocol.Stored() as m:
                self.reporting.stored(slot, m.key, m.path, m.error)
                if m.path is not None:
                    self._note_checkpoint(m.path, m.cursor)
            case protocol.Evaluate() as m:
                key = f"{self.core.run.life}/{m.key}"
                self._reply(self._evaluations.hear(key, uid, m))
            case _:
                self._hear_of_replicas(slot, message)

    def _hear_of_replicas(self, slot: int, message: protocol.Message) -> None:
        run = self.core.run
        match message:
            case protocol.Audit() as m:
                if run.record is not None and m.generation == run.record.number:
                    slots = [p.member.slot for p in run.holders()]
                    if (what := self._audits.add(slot, m, slots)) is not None:
                        self.core.replicas_differ(audit.message(m.step, what))
            case protocol.Claim() as m:
                if (what := self._audits.claim(slot, f"{m.name}, step {m.step + 1},", m.value)) is not None:
                    self.core.replicas_differ(audit.message_of_losses(what))

    def _hear_times(self, slot: int, timing: protocol.Timing) -> None:
        """What steps and messages take may make another table better than the one in force."""
        try:
            table = self.tables.better(slot, timing)
        except ValueError as error:  # A run that is under way goes on as it is.
            self.core.keep_table(str(error))
            return
        if table is not None:
            self.core.follow(table, self._now())

    def _pass_on(self, uid: str, message: protocol.Meet) -> None:
        """Pass on what a member says to all who meet in a group, and keep it for those that connect again."""
        if not self._meetings.keep(message.group, message.key, message):
            return
        if len(self._connected()) > LARGE_FLEET:
            self._said.append(message)
            return
        for other in self._connected():
            if other != uid:
                self._send(other, message)

    def _note_checkpoint(self, path: str, cursor: Cursor) -> None:
        """Keep the newest checkpoint, in whatever order members tell of them."""
        run = self.core.run
        if run.checkpoint is None or cursor.step >= run.checkpoint_cursor.step:
            run.checkpoint, run.checkpoint_cursor = path, cursor
            for uid in run.peers:
                self._send(uid, self._newest_checkpoint())

    def _newest_checkpoint(self) -> protocol.Checkpoint:
        return protocol.Checkpoint(path=self.core.run.checkpoint, cursor=self.core.run.checkpoint_cursor)

    # ---------------------------------------------------------------- what follows from it

    def settle(self) -> None:
        """Send what was decided, stamp what was logged, and see what follows for reports."""
        for entry in self.core.run.log.since(self._next_event):
            entry.time = time.time()
            event = entry.event
            if isinstance(event, events.Gone):
                self._asked_to_leave.discard(event.uid)
                self._reply(self._evaluations.forget(event.uid))
            if isinstance(event, events.Suspended):
                self._reply(self._evaluations.suspend(event.uid))
            if isinstance(event, events.CameBack):
                self._tell_what_it_has_missed(event)
            if isinstance(event, events.Gone) and not isinstance(event, events.Finished | events.Raised):
                self.reporting.forget(event.slot)
        self._next_event = self.core.run.log.next_seq
        self.send_all()
        if self.core.run.recovering:
            return  # A member that has not come back yet is not lost: its part of a report may be on its way.
        self.reporting.settle()
        self.send_all()
        if free := self.reporting.free_to_leave():
            for uid in free:
                self.core.leave(uid, self._now())
            self.settle()

    def _tell_what_it_has_missed(self, back: events.CameBack) -> None:
        """A member was suspended: what was said to all members meanwhile was not said to it."""
        if self.core.run.checkpoint is not None:
            self._send(back.uid, self._newest_checkpoint())
        self.reporting.came_back(back.uid, back.slot, missed=back.missed)
        self._reply(self._evaluations.came_back(back.uid))

    def _reply(self, replies: list[tuple[str, protocol.Reply]]) -> None:
        for uid, reply in replies:
            self._send(uid, reply)

    def send_all(self) -> None:
        """Send what the logic has decided."""
        for uid, message in self.core.drain():
            self._send(uid, message)
