"""Members that go: lost, dropped, leaving, finished, or with an exception."""

from __future__ import annotations

from msgspec import UNSET

from raytrain_het.membership import events
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.deaths import MAX_FRUITLESS_DEATHS
from raytrain_het.membership.ending import fail, let_go, release
from raytrain_het.membership.forming import (
    begin_if_all_are_there,
    form_if_all_have_answered,
    go_on_without,
    let_finished_go,
    start,
    want,
)
from raytrain_het.membership.peers import Peer, Phase
from raytrain_het.membership.protocol import Evicted
from raytrain_het.membership.state import RunState


def lose(run: RunState, uid: str, reason: str, now: float, *, died: bool) -> None:
    """The run goes on without a process.

    Args:
        run: the run.
        uid: the process's.
        reason: what is known of its end, for people.
        now: the time, seconds.
        died: whether the process is dead; else it is told that it is dropped.
    """
    suspended = run.suspended.pop(uid, None)
    peer = suspended.peer if suspended is not None else run.peers.pop(uid, None)
    if peer is None:
        return
    slot = peer.member.slot
    event = (events.Lost if died else events.Evicted)(
        slot=slot,
        uid=uid,
        reason=reason,
        expected=True if run.failure is not None else UNSET,
        left_out=peer.left_out or UNSET,
    )
    run.note(event)
    let_go(run, uid, Evicted(reason=reason))
    if run.failure is not None:
        return
    if run.deaths.lose_slot(slot):
        run.dead_slots.add(slot)
        run.note(events.GivenUp(slot=slot, reason=f"it died {MAX_FRUITLESS_DEATHS} times without a commit"))
    if run.recovering:
        return  # Whoever has called looks whether the others that are awaited are there.
    if run.record is None:
        begin_if_all_are_there(run)
    elif peer.phase is Phase.JOINING or suspended is not None:
        form_if_all_have_answered(run, now)
    else:
        if died and peer.healed and peer.phase is Phase.IN:
            run.deaths.lose_member(peer)
        go_on_without(run, uid, f"slot {slot} was lost: {reason}", now)


def leave(run: RunState, peer: Peer, now: float) -> None:
    """A member wants to go, in good order: it goes with the next generation."""
    if peer.phase is Phase.JOINING:
        release(run, peer.member.uid, "left")
        return
    if peer.phase is Phase.FINISHED:
        return  # It goes as soon as nobody needs it.
    peer.phase = Phase.LEAVING
    want(run, f"slot {peer.member.slot} leaves", now)


def finish(run: RunState, peer: Peer, cursor: Cursor, now: float, *, confirmed: bool) -> None:
    """A member's training function has come to its end: it goes once nobody needs what it holds.

    Args:
        run: the run.
        peer: the member.
        cursor: where it ended.
        now: the time, seconds.
        confirmed: whether it knows that all members have committed its last step.
    """
    if peer.phase is Phase.JOINING:
        release(run, peer.member.uid, "left")
        return
    peer.phase, peer.cursor, peer.confirmed = Phase.FINISHED, cursor, confirmed
    let_finished_go(run, now)


def go_on_without_finished(run: RunState, now: float) -> bool:
    """Form a generation if the others wait for a member whose function has returned; returns whether they do."""
    record = run.record
    if record is None:
        return False
    there = [run.peers.get(m.uid) for m in record.members]
    if not any(p is None or p.phase is Phase.FINISHED or p.returning for p in there):
        return False
    # Once is enough for those whose reports are still to be stored: the new base confirms the step they are of.
    for peer in run.peers.values():
        peer.returning = False
    start(run, void=True, reason="a member has finished and the others go on", now=now)
    return True


def raise_in(run: RunState, peer: Peer, error: str) -> None:
    """A member's training function has raised: the run fails with its traceback, and no generation follows."""
    uid, slot = peer.member.uid, peer.member.slot
    run.note(events.Raised(slot=slot, uid=uid, error=(error.strip().splitlines() or [""])[-1]))
    run.peers.pop(uid)
    let_go(run, uid, Evicted(reason="its training function raised"))
    fail(run, f"the training function of worker {slot} raised:\n{error}")
