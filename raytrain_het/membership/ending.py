"""Ends: of a member's part in the run, and of the run itself. What every other part of the logic may call."""

from __future__ import annotations

from raytrain_het.membership import events
from raytrain_het.membership.message_parts import Address, Poison
from raytrain_het.membership.peers import Phase
from raytrain_het.membership.protocol import Bye, End, Fail, Mismatch, ToMember
from raytrain_het.membership.record import Member
from raytrain_het.membership.state import RunState

MAX_GONE = 1000
"""So many of the processes that were let go are remembered, and told so should they come back."""


def fail(run: RunState, message: str, poison: Poison | None = None) -> None:
    """The run fails: all are told why."""
    _fail(run, Fail(message=message, poison=poison))


def fail_as_replicas_differ(run: RunState, message: str) -> None:
    """The run fails since members do not hold the same: they raise another error for it."""
    _fail(run, Mismatch(message=message))


def _fail(run: RunState, why: Fail | Mismatch) -> None:
    run.failure, run.failed_with = why.message, why
    run.note(events.Failed(message=why.message))
    for uid in run.peers:
        run.send(uid, why)


def let_go(run: RunState, uid: str, farewell: ToMember) -> None:
    """A process is no member any more. It is told so, and told again should it come back without having heard it."""
    run.send(uid, farewell)
    run.gone[uid] = farewell
    if len(run.gone) > MAX_GONE:
        del run.gone[next(iter(run.gone))]


def release(run: RunState, uid: str, how: str, heir: Member | None = None) -> None:
    """Let a member go in good order.

    Args:
        run: the run.
        uid: the member's.
        how: ``left`` or ``finished``.
        heir: the member that takes over its residual, if there is one.
    """
    peer = run.peers.pop(uid)
    if how == "finished":
        run.finished_slots.add(peer.member.slot)
    event = events.Finished if how == "finished" else events.Left
    run.note(event(slot=peer.member.slot, uid=uid, step=peer.cursor.step))
    address = Address(host=heir.host, port=heir.state_port) if heir is not None else None
    let_go(run, uid, Bye(how=how, heir=address))
    end_if_nobody_trains(run)


def end_if_nobody_trains(run: RunState) -> bool:
    """End the run once some have finished and no other member holds its state; returns whether it has ended."""
    if not run.finished_slots or run.holders() or run.still_to_train():
        return False
    for uid in list(run.peers):
        let_go(run, uid, End())
        run.peers.pop(uid)
    return True


def release_finished(run: RunState) -> None:
    """Let those go that have finished, unless another member may still need what they hold."""
    if run.recovering:
        return  # It is not known yet who else is there, and who needs them.
    finished, record = run.finished(), run.record
    if record is not None and any(p.cursor.step > record.base for p in finished):
        # A step takes all members. Those that had to load or compare first have done so, though they may not have said
        # it yet.
        for uid, peer in run.peers.items():
            if record.rank_of(uid) is not None and uid not in record.unhealed:
                peer.healed, peer.fresh = True, False
    training = [p for p in run.holders() if p.phase is not Phase.FINISHED] or run.still_to_train()
    for peer in finished:
        step = peer.cursor.step
        nobody_needs_it = all(p.cursor.step >= step for p in finished) and not training
        # The record's base confirms a step only to members that need not take it over or load it.
        confirmed = peer.confirmed and not (record is not None and record.has_to_be_handed_over(step))
        if confirmed or nobody_needs_it:
            release(run, peer.member.uid, "finished")
