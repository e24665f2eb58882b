"""From the members' answers to the next record: who goes, what all go on from, and what the record says."""

from __future__ import annotations

from collections.abc import Sequence

from raytrain_het.errors import ConfigError
from raytrain_het.membership import events
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.deaths import MAX_FRUITLESS_DEATHS
from raytrain_het.membership.ending import fail, release, release_finished
from raytrain_het.membership.message_parts import Poison
from raytrain_het.membership.next_record import Base, next_record
from raytrain_het.membership.peers import Peer, Phase, Succession, lag, succession
from raytrain_het.membership.protocol import Formed
from raytrain_het.membership.record import Member, Record
from raytrain_het.membership.state import RunState


def issue_first(run: RunState, reason: str) -> None:
    """Issue the first record of this hub, for all that have come: they load the checkpoint, or begin anew."""
    if run.table is None:
        try:
            run.table = run.table_for(sorted(p.member.slot for p in run.peers.values()))
        except (ConfigError, ValueError) as error:
            fail(run, str(error))
            return
        if run.table is not None:
            run.note(events.TableIssued.of(run.table))
    run.next.number += 1
    run.next.reason = reason
    _issue(run, [], Succession())


def issue_next(run: RunState, record: Record) -> None:
    """Issue the record that follows this one; every member has answered."""
    answered = run.members()
    after = succession(answered, joining=bool(run.joining() or run.suspended))
    staying = [p for p in answered if p not in after.going]
    for peer in after.going:
        if peer.member.uid not in run.peers:
            break  # The run has ended with the last one, and all that were left were told.
        how = "finished" if peer.phase is Phase.FINISHED else "left"
        heir = _heir(record, staying) if peer.cursor == after.base else None
        release(run, peer.member.uid, how, heir=heir)
    _issue(run, staying, after)


def keep_table(run: RunState, reason: str) -> None:
    """No other table could be made, so that in force stays. Logged once."""
    if reason != run.table_kept:
        run.table_kept = reason
        run.note(events.TableKept(reason=reason))


def _heir(record: Record, staying: Sequence[Peer]) -> Member | None:
    """The member that takes over the residual of one that leaves: of those with a share, as they send it soon.

    Only a leaver that has committed the base has an heir: any other one does not know what of the last step was sent.
    """
    shares = {m.uid: share for m, share in zip(record.members, record.shares, strict=True)}
    heirs = [p.member for p in staying if p.phase is Phase.IN and p.holds_state]
    return min(heirs, key=lambda m: (shares.get(m.uid, 0) == 0, m.slot), default=None)


def _issue(run: RunState, staying: Sequence[Peer], after: Succession) -> None:
    """Issue the record of a generation of those that stay and all that are joining."""
    peers = sorted([*staying, *run.joining()], key=lambda p: p.member.slot)
    if not peers:
        _count_deaths(run, run.deaths.last_step(), peers)
        if not run.finished_slots:  # The run has not ended: the slots' next workers start from the last checkpoint.
            run.record, run.next.voided, run.first_hello = None, False, None
            run.note(events.Empty())
        return
    # After a reset nobody is left to say in which step the last ones died.
    died_after = run.deaths.last_step() if after.base is None else after.base.step
    base = _base(run, peers, after)
    behind = lag(peers, base.cursor)
    run.disturbed |= bool(behind.unhealed)
    _count_deaths(run, died_after, peers)
    if run.failure is not None:
        return
    _fit_table(run, peers)
    if run.record is not None and base.cursor.step > run.record.base:
        run.deaths.links_hold()
    run.record = next_record(run, peers, base, behind)
    _tell_members(run, run.record, peers)


def _base(run: RunState, peers: Sequence[Peer], after: Succession) -> Base:
    if after.base is not None and after.source is not None:
        return Base(after.base, after.source.member.uid, reset=False)
    cursor = run.checkpoint_cursor if run.checkpoint else Cursor()
    for peer in peers:
        peer.healed, peer.fresh, peer.cursor = True, False, cursor
    return Base(cursor, peers[0].member.uid, reset=True)


def _tell_members(run: RunState, record: Record, peers: Sequence[Peer]) -> None:
    """Send the record to its members, and let those in that were joining."""
    formed = events.Formed(
        number=record.number,
        base=record.base,
        slots=[p.member.slot for p in peers],
        unhealed=[p.member.slot for p in peers if not p.healed],
        reason=record.reason,
        reset=record.reset,
        table=record.table,
        owners=[round(part, 4) for part in record.owners],
    )
    run.note(formed)
    message = Formed(record=record)  # One for all: it is encoded once.
    for peer in peers:
        if peer.phase is Phase.JOINING:
            peer.phase = Phase.IN
        if peer.healed and (peer.first_base < 0 or peer.fresh):
            peer.first_base = record.base
            # A worker that begins anew may report before its first step; one that has healed comes after that.
            peer.reports_after = record.base - record.reset
        peer.answered = False
        run.send(peer.member.uid, message)
    run.next.voided = False
    run.suspicion.forget()
    release_finished(run)


def _fit_table(run: RunState, peers: Sequence[Peer]) -> None:
    """A worker that has come gets a share of its own: its hardware may be other than its predecessor's."""
    if run.table is None:
        return
    try:
        table = run.table_for([p.member.slot for p in peers if p.healed])
    except (ConfigError, ValueError) as error:
        keep_table(run, str(error))
        return
    if table is not None:
        run.table = table
        run.note(events.TableIssued.of(table))


def _count_deaths(run: RunState, base: int, peers: Sequence[Peer]) -> None:
    """A generation is formed on this base: the run fails if the step after it has cost too many generations a member.

    Some sample of that step probably kills the process that trains on it.
    """
    lost, record = run.deaths.form_generation(base), run.record
    if not lost or record is None:
        return
    slots = sorted({p.member.slot for p in lost})
    uids = {p.member.uid for p in lost}
    ranks = [rank for rank, member in enumerate(record.members) if member.uid in uids]
    batch = next((p.batch for p in peers if p.batch), None)
    where = f" (epoch {batch[0]}, positions {batch[1]} to {batch[1] + batch[2]} of its order)" if batch else ""
    fail(
        run,
        f"Workers died {MAX_FRUITLESS_DEATHS} times in step {base + 1}{where}, the last in slots {slots}. "
        "Some sample of that step probably kills the process: train without it, or look at the workers' logs.",
        poison=Poison(step=base + 1, slots=slots, ranks=ranks, shares=record.shares),
    )
