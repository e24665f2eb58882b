"""Members that wait for each other: is one of them silent, slow, or does none go on at all?

:mod:`~raytrain_het.membership.suspicion` keeps the rounds of pings, and :mod:`~raytrain_het.membership.standstill`
compares the places where members say they are. Here the run draws the consequences.
"""

from __future__ import annotations

import math

from raytrain_het.membership import events
from raytrain_het.membership.departures import go_on_without_finished, lose
from raytrain_het.membership.ending import fail
from raytrain_het.membership.forming import members_wait_for_answers
from raytrain_het.membership.pace import pace_s
from raytrain_het.membership.peers import Peer
from raytrain_het.membership.protocol import Ping
from raytrain_het.membership.record import Member
from raytrain_het.membership.standstill import (
    ASK_AGAIN_S,
    LOG_AFTER_S,
    TYPICAL_STEPS,
    deadlocked,
    is_innocent,
    longest_wait,
    somebody_waits,
    to_blame,
    where_all_are,
)
from raytrain_het.membership.state import RunState
from raytrain_het.membership.suspending import suspend

LOOK_S = 0.2


def ping(run: RunState, now: float) -> None:
    """Ask all members where they are; they answer whatever their training functions do."""
    run.waits.asked_at = now
    run.announce(Ping())


def suspect(run: RunState, generation: int, step: int, now: float) -> None:
    """A member has waited past its deadline in a step. This is only a suspicion: all are pinged."""
    if run.record is None or generation != run.record.number or run.next.voided:
        return
    if go_on_without_finished(run, now):
        return
    if run.suspicion.suspect(generation, step, now):
        ping(run, now)


def look_around(run: RunState, now: float) -> None:
    """A member has answered a ping: see whether a round of pings is over, and whether all wait for each other."""
    _settle_suspicion(run, now)
    _look_for_a_standstill(run, now)


def suspend_silent(run: RunState, now: float) -> None:
    """Go on without the members that have left a ping unanswered for too long.

    If nobody were left who holds the run's state, the others wait: beginning again would cost more.
    """
    silent, limit_s = run.suspicion.silent(run.members(), now), run.config.hang_limit_s
    somebody_holds = any(p not in silent for p in run.holders())
    for peer in silent:
        if somebody_holds:
            suspend(run, peer, f"silent for {run.suspicion.patience_s:.2g} s while its peers waited", now)
        elif now - peer.heard >= limit_s:
            lose(run, peer.member.uid, f"silent for {limit_s:g} s while its peers waited", now, died=False)


def in_doubt(run: RunState, now: float) -> list[Member]:
    """Members to be asked after on their machines: those that have left a ping unanswered for a while, and now and
    again those that are not connected, or suspended."""
    found = [p.member for p in run.suspicion.unheard(run.members(), now)]
    if now - run.waits.asked_after_at >= ASK_AGAIN_S:
        run.waits.asked_after_at = now
        found += [p.member for p in run.peers.values() if p.away and p.member not in found]
        found += [s.peer.member for s in run.suspended.values()]
    return found


def suspend_stopped(run: RunState, uid: str, now: float) -> None:
    """A process is stopped, by a signal or a debugger: go on without it, if members wait."""
    peer = run.peers.get(uid)
    if peer is None or run.suspicion.round is None or peer.heard > run.suspicion.round.began:
        return
    if any(p is not peer for p in run.holders()):
        suspend(run, peer, "its process is stopped", now)
        look_around(run, now)


def lose_unheard(run: RunState, now: float) -> None:
    """Lose the members that nothing was heard of for the hang limit."""
    limit_s = run.config.hang_limit_s
    heard = {p.member.uid: max(p.heard, p.known_to_run) for p in run.peers.values() if p.away}
    heard |= {uid: s.peer.heard for uid, s in run.suspended.items()}
    for uid, at in heard.items():
        if now - at >= limit_s:
            lose(run, uid, f"nothing was heard of it for {limit_s:g} s", now, died=False)


def look_for_missing_answers(run: RunState, now: float) -> None:
    """While a generation is formed: ping members that have yet to answer, and drop them after the hang limit."""
    if not members_wait_for_answers(run, now):
        return
    missing = [p for p in run.members() if not p.answered]
    if missing and now - run.next.since >= run.config.hang_limit_s:
        for peer in missing:
            lose(run, peer.member.uid, "it did not answer within the hang limit", now, died=False)
    elif missing and run.suspicion.begin(now):
        ping(run, now)


def ask_again(run: RunState, now: float) -> None:
    """As long as a member waits, all are asked now and again where they are."""
    if now - run.waits.asked_at >= pace_s(ASK_AGAIN_S, len(run.peers)) and somebody_waits(run.holders()):
        ping(run, now)


def _settle_suspicion(run: RunState, now: float) -> None:
    in_a_step = run.suspicion.settled(run.members(), now)
    if in_a_step is not None:
        _drop_what_holds_up(run, in_a_step, now)


def _drop_what_holds_up(run: RunState, in_a_step: bool, now: float) -> None:
    """Drop the members for which others have waited for the hang limit, but none that waits for others itself.

    Where no member is to blame, the run fails.
    """
    limit_s, since = run.config.hang_limit_s, run.suspicion.since
    late = run.suspicion.late(run.members(), now) if in_a_step else []
    # Who waits in a step may be behind others only since it needs what they do not: whoever does not wait is to blame.
    late = [p for p in late if not p.place.waits] or late
    busy = [p for p in run.holders() if not p.place.waits]
    if not late:
        if longest_wait(run.holders(), now) < limit_s or run.under_way():
            return
        late, since = busy, None
    elif all(map(is_innocent, late)):
        if run.under_way():
            return  # A slow storage is nobody's hang.
        late = busy or late
    began = since[2] if since is not None else -math.inf
    # A member is first heard to be at a place by a ping, up to this much later than it came there.
    guilty = to_blame(late, began, limit_s - run.config.silence_s, now)
    for peer in guilty:
        at = f"; it was {peer.place.text}" if peer.place.text else ""
        lose(run, peer.member.uid, f"its peers waited {limit_s:g} s for it{at}", now, died=False)
    if not guilty and all(map(is_innocent, late)) and not run.forming:
        fail(
            run,
            f"the workers have waited for {limit_s:g} s, and none of them is to blame: "
            f"{where_all_are(run.holders())}. If it may, raise HetConfig(hang_limit_s={limit_s:g}).",
        )


def _look_for_a_standstill(run: RunState, now: float) -> None:
    holders = run.holders()
    if run.failure is not None or run.record is None or run.forming or not somebody_waits(holders):
        return
    if not deadlocked(holders, now) or run.under_way():
        _log_wait(run, holders, now)
    elif not go_on_without_finished(run, now):
        fail(
            run,
            f"every worker waits for another one, and none will go on: {where_all_are(holders)}. The training "
            "function must make the same calls (loader, report, evaluate) in the same order on every worker: look "
            "for what only some of them do, such as `if rank == 0:`.",
        )


def _log_wait(run: RunState, holders: list[Peer], now: float) -> None:
    """Log a wait that lasts: once for the same places, and not too often."""
    waited_s, waits = longest_wait(holders, now), run.waits
    places = tuple((p.member.slot, p.place.text) for p in holders)
    if waited_s < max(LOG_AFTER_S, TYPICAL_STEPS * waits.step_s) or places == waits.logged:
        return
    if now - waits.logged_at < LOG_AFTER_S:
        return
    waits.logged, waits.logged_at = places, now
    event = events.Waiting(
        slots=[p.member.slot for p in holders if not p.place.waits],
        waited_s=round(waited_s, 1),
        reason=where_all_are(holders),
        limit_s=run.config.hang_limit_s,
    )
    run.note(event)
