"""Members that do not answer: the others go on without them, and each comes back in place when it is heard again.

A *suspended* member keeps its process, its slot and what its codec has left out. It is lost only when it is proved
dead, or when the hang limit has passed. When it is heard again it has either missed nothing, and stands where it
stood, or generations were formed without it: then it heals from the others, like a process that joins.
"""

from __future__ import annotations

from raytrain_het.membership import events
from raytrain_het.membership.ending import let_go, release
from raytrain_het.membership.forming import (
    ask_to_answer,
    begin_if_all_are_there,
    form_if_all_have_answered,
    go_on_without,
    want,
)
from raytrain_het.membership.peers import Peer, Phase, Suspended
from raytrain_het.membership.protocol import End
from raytrain_het.membership.state import RunState


def suspend(run: RunState, peer: Peer, reason: str, now: float) -> None:
    """The others go on without a member that does not answer. There is a record.

    Args:
        run: the run.
        peer: the member.
        reason: what is known of it, for people.
        now: the time, seconds.
    """
    uid, slot = peer.member.uid, peer.member.slot
    in_force = run.record.number if run.record is not None else 0
    del run.peers[uid]
    run.suspended[uid] = Suspended(peer=peer, since=now, generation=in_force, asked_for=run.next.number)
    run.note(events.Suspended(slot=slot, uid=uid, reason=reason))
    if peer.phase is Phase.JOINING:
        form_if_all_have_answered(run, now)
    else:
        go_on_without(run, uid, f"slot {slot} is suspended: {reason}", now)


def come_back(run: RunState, uid: str, now: float) -> None:
    """A suspended member is heard again."""
    over, suspended = run.over, run.suspended.pop(uid)
    peer, record = suspended.peer, run.record
    missed = record is None or record.number != suspended.generation
    run.note(events.CameBack(slot=peer.member.slot, uid=uid, away_s=round(now - suspended.since, 3), missed=missed))
    if over:
        let_go(run, uid, End())
        return
    peer.heard, run.peers[uid] = now, peer
    if run.failed_with is not None:
        run.send(uid, run.failed_with)
        return
    if peer.phase is Phase.JOINING or not missed:
        peer.answered &= run.next.number == suspended.asked_for
        ask_to_answer(run, peer)
        if peer.phase is Phase.JOINING:
            want(run, f"slot {peer.member.slot} comes back", now)
        form_if_all_have_answered(run, now)
    elif peer.phase in (Phase.LEAVING, Phase.FINISHED):  # The others have gone on without it, as it wanted.
        release(run, uid, "finished" if peer.phase is Phase.FINISHED else "left")
    else:
        _join_again(run, peer, now)


def _join_again(run: RunState, peer: Peer, now: float) -> None:
    """Generations were formed without it: it holds a state of the past, so it heals from those that have gone on."""
    peer.phase, peer.answered = Phase.JOINING, False
    if run.record is None:  # All others are gone meanwhile.
        run.first_hello = now if run.first_hello is None else run.first_hello
        begin_if_all_are_there(run)
        return
    if run.holders():
        peer.healed = peer.fresh = False
    want(run, f"slot {peer.member.slot} comes back", now)
    form_if_all_have_answered(run, now)
