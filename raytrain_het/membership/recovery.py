"""A hub that has been restarted: members show it the records they hold, and it puts the newest in force again."""

from __future__ import annotations

from raytrain_het.membership import events
from raytrain_het.membership.forming import (
    form_if_all_have_answered,
    form_if_all_have_verified,
    let_finished_go,
    start,
    want,
)
from raytrain_het.membership.next_record import table_of
from raytrain_het.membership.peers import Peer, Phase, Suspended
from raytrain_het.membership.record import Record
from raytrain_het.membership.state import Restart, RunState

RECOVERY_GRACE_S = 10.0
"""A restarted hub waits for the members of the newest record for so long."""


def rejoin(run: RunState, peer: Peer, record: Record, answered: int, now: float) -> None:
    """A member has come that an earlier hub let in.

    Args:
        run: the run.
        peer: the member.
        record: the newest record that it has.
        answered: the highest generation number that it has answered to.
        now: the time, seconds.
    """
    if run.record is not None:  # It was away when the others went on.
        peer.healed = peer.fresh = False
        want(run, f"slot {peer.member.slot} comes back", now)
        form_if_all_have_answered(run, now)
        return
    peer.phase = Phase.IN
    run.next.number = max(run.next.number, record.number, answered)
    newest = run.restart.record
    if newest is not None and newest.number != record.number or answered > record.number:
        run.restart.needs_void = True
    if newest is None or record.number > newest.number:
        run.restart.record = record
    resume_if_all_are_there(run, now)


def resume_if_all_are_there(run: RunState, now: float) -> None:
    """Resume once every member of the newest record has come or is known to be gone."""
    record = run.restart.record
    if record is None or run.failure is not None:
        return
    known = {m.uid for m in record.members}
    # A new process in a member's slot says that the member is dead.
    taken = {p.member.slot for p in run.peers.values() if p.member.uid not in known}
    awaited = {m.uid for m in record.members if m.slot not in taken} - run.gone.keys()
    if awaited <= run.peers.keys():
        resume(run, record, now)


def _suspend_the_missing(run: RunState, record: Record, now: float) -> None:
    """Members that have not come back yet may still do so."""
    taken = {p.member.slot for p in run.peers.values()}
    for member in record.members:
        uid = member.uid
        if uid in run.peers or uid in run.gone or member.slot in taken:
            continue
        peer = Peer(member=member, phase=Phase.IN, heard=now, cursor=record.cursor, away=True)
        peer.healed, peer.fresh = uid not in record.unhealed, uid in record.fresh
        number = record.number
        run.suspended[uid] = Suspended(peer=peer, since=now, generation=number, asked_for=number)
        run.note(events.Suspended(slot=member.slot, uid=uid, reason="it has not come back to the restarted hub"))


def resume(run: RunState, record: Record, now: float) -> None:
    """Put the newest record in force again, and ask for another one if anything happened to it meanwhile."""
    needs_void, run.restart = run.restart.needs_void, Restart()
    next_number = max(run.next.number, record.number) + 1
    run.record, run.next.number = record, record.number
    run.table = table_of(record, codecs_chosen=run.config.compression_error is not None)
    run.disturbed = True
    run.note(events.Recovered(number=record.number))
    members = {m.uid for m in record.members}
    _suspend_the_missing(run, record, now)
    for peer in run.members():
        if peer.member.uid not in members:  # The others have gone on without it.
            peer.phase, peer.healed, peer.fresh = Phase.JOINING, False, False
    if record.reset:  # As when it was issued: members that were loading then have not said that they have done so.
        loading = members.difference(record.unhealed)
        for peer in run.members():
            if peer.member.uid in loading and not peer.healed:
                peer.healed, peer.fresh, peer.cursor = True, False, record.cursor
    if needs_void or members - run.peers.keys():
        start(run, void=True, reason="the membership actor was restarted", now=now, number=next_number)
    elif any(p.phase is Phase.JOINING or p.fresh and uid in record.unhealed for uid, p in run.peers.items()):
        start(run, void=False, reason="workers have joined or healed", now=now, number=next_number)
    form_if_all_have_verified(run, now)
    let_finished_go(run, now)
