"""A member whose connection was cut connects again: nothing has happened to it, but messages may have been lost."""

from __future__ import annotations

from raytrain_het.membership.forming import (
    ask_to_answer,
    form_if_all_have_answered,
    form_if_all_have_verified,
    want,
)
from raytrain_het.membership.peers import Peer, Phase, Standing
from raytrain_het.membership.protocol import Formed
from raytrain_het.membership.record import Record
from raytrain_het.membership.state import RunState


def reconnect(
    run: RunState, peer: Peer, standing: Standing, *, record: Record | None, answered: int, now: float
) -> None:
    """Take from its greeting what may have been lost on the way here, and tell it what it may have missed.

    Args:
        run: the run.
        peer: the member.
        standing: where it stands.
        record: the newest record that it has.
        answered: the highest generation number that it has answered to.
        now: the time, seconds.
    """
    peer.heard, peer.away = now, False
    uid, in_force = peer.member.uid, run.record
    if peer.phase is Phase.JOINING or in_force is None:
        return
    if in_force.rank_of(uid) is not None and (record is None or record.number < in_force.number):
        run.send(uid, Formed(record=in_force))
    if run.forming and answered >= run.next.number and not peer.answered:
        peer.stands(standing.under(in_force, uid))
        peer.answered = True
        form_if_all_have_answered(run, now)
        return
    ask_to_answer(run, peer)
    if record is not None and record.number == in_force.number:
        _catch_up(run, peer, standing, now)


def _catch_up(run: RunState, peer: Peer, standing: Standing, now: float) -> None:
    """It may have said meanwhile that it is healed, or that it has compared itself."""
    if standing.healed and standing.fresh and not peer.healed:
        peer.healed = peer.fresh = True
        want(run, f"slot {peer.member.slot} is healed", now)
    elif standing.healed and not standing.fresh and peer.fresh:
        peer.fresh = False
        form_if_all_have_verified(run, now)
