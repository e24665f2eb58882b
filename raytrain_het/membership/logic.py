"""The membership logic: a pure state machine, without sockets, threads or clocks.

Calls go in: a message of a member, a closed connection, Ray's word, the time. Each changes the
:class:`~raytrain_het.membership.state.RunState` through the parts that are listed there, and messages to members come
out of :meth:`Membership.drain`. ``tests/unit/test_membership_interleavings.py`` enumerates the orders of calls.
"""

from __future__ import annotations

from raytrain_het.balance.scoreboard import Table
from raytrain_het.config import HetConfig
from raytrain_het.membership import departures, events, forming, reconnecting, recovery, suspending, watching
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.ending import fail, fail_as_replicas_differ
from raytrain_het.membership.event_log import EventLog
from raytrain_het.membership.issuing import issue_first, keep_table
from raytrain_het.membership.pace import LARGE_FLEET
from raytrain_het.membership.peers import Peer, Phase, Standing
from raytrain_het.membership.place import Place
from raytrain_het.membership.protocol import End, Mismatch, ToMember
from raytrain_het.membership.record import Member, Record
from raytrain_het.membership.run_context import RunContext
from raytrain_het.membership.state import RunState
from raytrain_het.membership.suspicion import Suspicion


class Membership:
    """Hears what happens in a run, and decides who takes part in it.

    Args:
        config: the run's settings.
        context: what else there is to know of the run.
        incarnation: which life of the hub this is; a later one has a larger number.
    """

    def __init__(self, config: HetConfig, context: RunContext, *, incarnation: int) -> None:
        self.run = RunState(
            config=config,
            context=context,
            incarnation=incarnation,
            log=EventLog(first_seq=incarnation // 1_000_000),
            suspicion=Suspicion(config),
            checkpoint=context.checkpoint,
            checkpoint_cursor=context.checkpoint_cursor or Cursor(),
        )

    def drain(self) -> list[tuple[str, ToMember]]:
        """Messages to send, as (uid, message), in order."""
        out, self.run.outbox = self.run.outbox, []
        return out

    # ---------------------------------------------------------------- processes come and go

    def hello(
        self,
        member: Member,
        standing: Standing,
        *,
        now: float,
        record: Record | None = None,
        answered: int = 0,
        want: int = 0,
        fingerprint: str = "",
    ) -> None:
        """A worker has connected, for the first time, or again after its connection was cut or the hub restarted.

        Args:
            member: who it is.
            standing: where it stands.
            now: the time, seconds.
            record: the newest record that it has; None for the first time.
            answered: the highest generation number that it has answered to.
            want: the highest generation number that it was told of.
            fingerprint: of its model and data; empty where it has not said.
        """
        run, uid = self.run, member.uid
        farewell = run.gone.get(uid) or run.failed_with
        if farewell is not None:
            run.send(uid, farewell)
            return
        for other in run.uids_in(member.slot) - {uid}:
            self.dead(other, "its slot was taken by a new process", now)
        if uid in run.suspended:
            suspending.come_back(run, uid, now)
            if uid not in run.peers:
                return  # It was told that it is not needed any more.
        if uid in run.peers:
            reconnecting.reconnect(run, run.peers[uid], standing, record=record, answered=answered, now=now)
            return
        if run.over:
            run.send(uid, End())
            return
        if self._refuse_other_model(member, fingerprint):
            return
        peer = Peer(member=member, phase=Phase.JOINING, heard=now)
        peer.stands(standing.under(record, uid))
        if record is None:
            self._join(peer, now)
        else:
            self._add(peer, now)
            recovery.rejoin(run, peer, record, max(answered, want), now)

    def _add(self, peer: Peer, now: float) -> None:
        run, slot = self.run, peer.member.slot
        run.vacant.discard(slot)
        if run.first_hello is None:
            run.first_hello = now
        run.peers[peer.member.uid] = peer
        run.num_joined[slot] += 1

    def _join(self, peer: Peer, now: float) -> None:
        """A new process has come: it takes part from the next generation on."""
        run, member = self.run, peer.member
        self._add(peer, now)
        run.note(events.Joined(slot=member.slot, uid=member.uid, device=member.device, host=member.host))
        if run.recovering:
            recovery.resume_if_all_are_there(run, now)
        elif run.record is None:
            forming.begin_if_all_are_there(run)
        elif not run.forming:
            forming.want(run, f"slot {member.slot} joins", now)
        else:
            forming.form_if_all_have_answered(run, now)

    def disconnected(self, uid: str) -> None:
        """A member's connection has closed, which says nothing of its process: that connects again if it can."""
        if (peer := self.run.peers.get(uid)) is not None:
            peer.away = True

    def dead(self, uid: str, reason: str, now: float) -> None:
        """A process is proved dead: by the kernel of its machine, by Ray, or by its successor."""
        departures.lose(self.run, uid, reason, now, died=True)
        recovery.resume_if_all_are_there(self.run, now)

    def runs(self, uid: str, now: float) -> None:
        """A process is known to run, though it may be too busy to say so itself.

        That is as good as its word, unless it is not connected: then it hears nothing either.
        """
        peer = self.run.peers.get(uid)
        if peer is not None:
            peer.known_to_run = now
            if not peer.away:
                peer.heard = now
                self.run.suspicion.vouch()
                watching.look_around(self.run, now)

    def stopped(self, uid: str, now: float) -> None:
        """A process is known to be stopped: the others go on without it, if they wait."""
        watching.suspend_stopped(self.run, uid, now)

    def in_doubt(self, now: float) -> list[Member]:
        """Members that should be asked after on their machines now."""
        return watching.in_doubt(self.run, now)

    def heard_again(self, uid: str, now: float) -> None:
        """A member has said something; if it was suspended it comes back."""
        if uid in self.run.suspended:
            suspending.come_back(self.run, uid, now)

    def slot_lost(self, slot: int, reason: str, now: float) -> None:
        """Ray says that the worker in a slot is dead."""
        for uid in self.run.uids_in(slot):
            self.dead(uid, reason, now)

    def slot_vacant(self, slot: int, reason: str, now: float) -> None:
        """No worker can be placed in this slot at the moment."""
        run = self.run
        if slot not in run.vacant:
            run.vacant.add(slot)
            run.note(events.Vacant(slot=slot, reason=reason))
            if run.record is None and not run.recovering:
                forming.begin_if_all_are_there(run)

    # ---------------------------------------------------------------- what members say of a generation

    def answer(self, uid: str, number: int, standing: Standing, *, now: float, batch: list[int] | None = None) -> None:
        """A member has stopped committing for the old generation, and says where it stands.

        Args:
            uid: the member's.
            number: of the generation that it answers to.
            standing: where it stands.
            now: the time, seconds.
            batch: ``[epoch, first sample, samples]`` of the step that is open.
        """
        run, peer = self.run, self.run.heard(uid, now)
        if peer is None or run.record is None or number <= run.record.number or peer.phase is Phase.JOINING:
            return
        if number > run.next.number:
            # An earlier hub may have told members of a number that this one does not know.
            forming.start(run, void=False, reason="a member asks for it", now=now, number=number)
        peer.stands(standing.under(run.record, uid))
        peer.batch, peer.answered = batch, True
        forming.form_if_all_have_answered(run, now)

    def failed(self, uid: str, generation: int, reason: str, now: float) -> None:
        """A member's collective has failed."""
        run = self.run
        if run.heard(uid, now) is None:
            return
        if run.recovering:
            run.restart.needs_void = True
        elif run.record is not None and generation == run.record.number:
            forming.start(run, void=True, reason=f"a collective failed: {reason}", now=now)

    def healed(self, uid: str, now: float) -> None:
        """A member that was catching up has done so, and wants a share."""
        peer = self.run.heard(uid, now)
        if peer is not None and peer.phase is not Phase.JOINING:
            peer.healed = peer.fresh = True
            forming.want(self.run, f"slot {peer.member.slot} is healed", now)

    def verified(self, uid: str, now: float) -> None:
        """A healed member has compared itself with the source: it holds the same.

        Once all have, a generation follows in which nobody is fresh. By this members see who may hold checkpoints and
        whether the source must still serve those that heal, and the caller sees that shares may follow speeds again.
        """
        peer = self.run.heard(uid, now)
        if peer is not None:
            peer.fresh = False
            forming.form_if_all_have_verified(self.run, now)

    def follow(self, table: Table, now: float) -> None:
        """Shares and gradient weights come from this table from the next generation on."""
        self.run.table = table
        self.run.note(events.TableIssued.of(table))
        forming.want(self.run, f"table {table.version}", now)

    def keep_table(self, reason: str) -> None:
        """No other table could be made, so that in force stays. Logged once."""
        keep_table(self.run, reason)

    # ---------------------------------------------------------------- what members say of themselves

    def suspect(self, uid: str, generation: int, step: int, now: float) -> None:
        """A member has waited past its deadline in a step."""
        if self.run.heard(uid, now) is not None:
            watching.suspect(self.run, generation, step, now)

    def waiting(self, uid: str, now: float) -> None:
        """A member waits for others outside of a collective: are they all alive?"""
        run = self.run
        if run.heard(uid, now) is not None and run.record is not None and run.suspicion.begin(now):
            watching.ping(run, now)

    def pong(self, uid: str, position: int, now: float, place: Place | None = None) -> None:
        """A member has answered a ping: how far it is in its collectives, and where its training function is."""
        peer = self.run.heard(uid, now)
        if peer is not None:
            peer.is_at(place or Place(), position, now)
            if len(self.run.peers) <= LARGE_FLEET:
                watching.look_around(self.run, now)

    def progress(self, uid: str, step: int, now: float, left_out: float | None = None, step_s: float = 0.0) -> None:
        """A member has committed a step. Members say so from time to time only.

        Args:
            uid: the member's.
            step: the last that it has committed.
            now: the time, seconds.
            left_out: the norm of its codec's residual.
            step_s: what a typical step takes it, seconds.
        """
        peer = self.run.heard(uid, now)
        if peer is None:
            return
        peer.reached, peer.left_out = max(peer.reached, step), left_out
        self.run.waits.step_s = step_s
        if step > max(peer.first_base, 0) and peer.first_base >= 0:
            self.run.deaths.commit(peer.member.slot)

    def leave(self, uid: str, now: float) -> None:
        """A member wants to go, in good order."""
        peer = self.run.heard(uid, now)
        if peer is not None:
            departures.leave(self.run, peer, now)

    def returning(self, uid: str, now: float) -> None:
        """A member's training function has returned; it finishes once its reports are acknowledged."""
        peer = self.run.heard(uid, now)
        if peer is not None:
            peer.returning = True

    def finish(self, uid: str, *, cursor: Cursor, confirmed: bool, now: float, complete: bool = True) -> None:
        """A member's training function has come to its end, and its reports are stored. ``complete``: it has gone over
        all epochs."""
        peer = self.run.heard(uid, now)
        if peer is not None:
            self.run.complete |= complete
            departures.finish(self.run, peer, cursor, now, confirmed=confirmed)

    def raised(self, uid: str, error: str, now: float) -> None:
        """A member's training function has raised an exception."""
        peer = self.run.heard(uid, now)
        if peer is not None and self.run.failure is None:
            departures.raise_in(self.run, peer, error)

    # ---------------------------------------------------------------- errors

    def replicas_differ(self, message: str) -> None:
        """Members have compared their replicas and found that they are not the same: the run ends."""
        if self.run.failure is None:
            fail_as_replicas_differ(self.run, message)

    def broken(self, error: str, about: str = "") -> None:
        """The caller has met an error in this logic or around it: the run ends, as nobody knows what was half done."""
        if self.run.failure is None:
            fail(self.run, f"the membership actor failed{about} ({error}); its log has the traceback.")

    def misused(self, message: str) -> None:
        """The training function does what cannot be right: the run ends before it has trained on."""
        if self.run.failure is None and self.run.record is not None:
            fail(self.run, message)

    def _refuse_other_model(self, member: Member, fingerprint: str) -> bool:
        """Workers must train the same model on the same data. One that does not ends the run, so nobody waits for it.

        Returns whether this one does not.
        """
        run = self.run
        if not fingerprint:
            return False
        if run.fingerprint is None:
            run.fingerprint = (fingerprint, member.slot)
        first, slot = run.fingerprint
        if first == fingerprint:
            return False
        message = (
            f"worker {member.slot} built another model or dataset than worker {slot}: "
            f"{fingerprint} against {first}. Build the same on every worker, "
            "whatever its device, rank or random seed."
        )
        run.send(member.uid, Mismatch(message=message))
        fail(run, message)
        return True

    # ---------------------------------------------------------------- time

    def tick(self, now: float) -> None:
        """Time has passed."""
        run = self.run
        if run.failure is not None:
            return
        self._wait_no_longer_for_the_start(now)
        watching.suspend_silent(run, now)
        watching.look_for_missing_answers(run, now)
        if now - run.waits.looked_at >= watching.LOOK_S:  # What need not be known at once, and looks at every member.
            run.waits.looked_at = now
            watching.lose_unheard(run, now)
            watching.ask_again(run, now)
            if len(run.peers) > LARGE_FLEET:
                watching.look_around(run, now)

    def _wait_no_longer_for_the_start(self, now: float) -> None:
        run = self.run
        if run.record is not None or run.first_hello is None:
            return
        waited_s, limit_s = now - run.first_hello, run.config.start_timeout_s
        if run.restart.record is not None:
            if waited_s >= recovery.RECOVERY_GRACE_S:
                recovery.resume(run, run.restart.record, now)
        elif waited_s >= limit_s:
            issue_first(run, f"{limit_s:g} s have passed")
