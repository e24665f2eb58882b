"""How a generation is formed: it is asked for, members answer, and once all have answered it is issued.

It is asked for in one of two ways. A *void* is for a failure: all answer at once, and drop what the old generation has
under way. A *want* is for a change that can wait for the end of the step: members pass it on in their step headers,
commit, and then answer.
"""

from __future__ import annotations

from raytrain_het.membership import events
from raytrain_het.membership.deaths import MAX_FRUITLESS_GENERATIONS
from raytrain_het.membership.ending import end_if_nobody_trains, fail, release_finished
from raytrain_het.membership.issuing import issue_first, issue_next
from raytrain_het.membership.peers import Peer, Phase
from raytrain_het.membership.protocol import Void, Want
from raytrain_het.membership.state import RunState


def begin_if_all_are_there(run: RunState) -> None:
    """Issue the first record once each slot has a worker, or will have none."""
    joined = {p.member.slot for p in run.peers.values()}
    if joined and joined | run.vacant | run.dead_slots >= set(range(run.context.num_slots)):
        issue_first(run, "the run starts")


def start(run: RunState, *, void: bool, reason: str, now: float, number: int = 0) -> None:
    """Ask for another generation.

    One that was asked for already becomes void if ``void`` is true; it keeps its reason.

    Args:
        run: the run.
        void: whether the present one is over at once; else it goes on to the end of its step.
        reason: why, for people.
        now: the time, seconds.
        number: the least number that the generation gets.
    """
    if run.failure is not None or run.record is None:
        return
    if run.forming:
        if void and not run.next.voided:
            # The step has failed, so some members may never come to its end, where they would learn of the want.
            run.next.voided, run.next.since = True, now
            run.announce(Void(number=run.next.number))
        form_if_all_have_answered(run, now)
        return
    ahead = run.next
    ahead.number = max(ahead.number + 1, number)
    ahead.voided, ahead.since, ahead.reason, ahead.some_have_answered = void, now, reason, False
    for peer in run.peers.values():
        peer.answered = False
    if void and run.deaths.lose_generation():
        fail(
            run,
            f"{MAX_FRUITLESS_GENERATIONS} generations in a row failed without a death or a commit ({reason}). "
            "A link between two workers must be broken: check that all nodes reach each other on all ports.",
        )
        return
    run.disturbed |= void
    run.note((events.Void if void else events.Wanted)(number=ahead.number, reason=reason))
    run.announce(Void(number=ahead.number) if void else Want(number=ahead.number))
    form_if_all_have_answered(run, now)


def want(run: RunState, reason: str, now: float) -> None:
    """Ask for another generation at the end of the step, unless one is being formed: that one serves too."""
    if not run.forming:
        start(run, void=False, reason=reason, now=now)


def form_if_all_have_answered(run: RunState, now: float) -> None:
    """Issue the generation that is being formed, if every member of the last one has answered or is gone."""
    if run.record is None or not run.forming or run.failure is not None:
        return
    if not all(p.answered for p in run.members()) or _must_wait_for_a_holder(run):
        return
    issue_next(run, run.record)
    # A member that leaves, and alone held the base, stays for one more generation: the others take its state over.
    source = run.peers.get(run.record.source or "") if run.record is not None else None
    if source is not None and source.phase is not Phase.IN:
        start(run, void=False, reason=f"slot {source.member.slot} leaves", now=now)


def _must_wait_for_a_holder(run: RunState) -> bool:
    """Whether nobody who is here holds the run's state, and somebody who is suspended does: it may come back, and
    beginning again from a checkpoint would cost more than any wait."""
    number = run.record.number if run.record is not None else 0
    return not run.holders() and any(s.peer.holds_state and s.generation == number for s in run.suspended.values())


def go_on_without(run: RunState, uid: str, why: str, now: float) -> None:
    """The others go on without a member that was lost, dropped or suspended; it is no peer any more."""
    run.deaths.links_hold()
    if end_if_nobody_trains(run):
        return
    run.next.reason = why
    let_finished_go(run, now)
    if run.record is not None and run.record.rank_of(uid) is not None:
        start(run, void=True, reason=why, now=now)


def ask_to_answer(run: RunState, peer: Peer) -> None:
    """Ask one member for its answer to the generation that is being formed: it may not have heard of it."""
    if run.forming and not peer.answered and peer.phase is not Phase.JOINING:
        number = run.next.number
        run.send(peer.member.uid, Void(number=number) if run.next.voided else Want(number=number))


def let_finished_go(run: RunState, now: float) -> None:
    """Release members that have finished and that nobody needs; a generation may have waited for them alone."""
    release_finished(run)
    form_if_all_have_answered(run, now)


def form_if_all_have_verified(run: RunState, now: float) -> None:
    """Ask for a generation in which nobody is fresh any more, once all have compared themselves with the source."""
    record = run.record
    if record is None or not record.fresh or run.forming:
        return
    # While others heal, a new generation would make them ask for another snapshot. One follows anyway when they have.
    if not record.unhealed and not any(run.peers[u].fresh for u in record.fresh if u in run.peers):
        slots = ", ".join(str(record.member(uid).slot) for uid in record.fresh)
        start(run, void=False, reason=f"slot {slots} is as the others", now=now)


def members_wait_for_answers(run: RunState, now: float) -> bool:
    """Whether members wait for each other's answers: after a void all do, after a want those that have answered.

    Such a wait is seen here alone: no collective is under way that could be suspected.
    """
    if not run.forming:
        return False
    ahead = run.next
    if not ahead.voided and not ahead.some_have_answered and any(p.answered for p in run.members()):
        ahead.some_have_answered, ahead.since = True, now
    return ahead.voided or ahead.some_have_answered
