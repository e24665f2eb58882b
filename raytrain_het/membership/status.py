"""A run as people see it: who takes part, how far they are, and how well the fleet is used."""

from __future__ import annotations

from typing import Any, TypedDict

import msgspec

from raytrain_het.balance.gradient_weights import effective_batch_size
from raytrain_het.membership.peers import Peer
from raytrain_het.membership.protocol import Stats
from raytrain_het.membership.record import Record
from raytrain_het.membership.state import RunState
from raytrain_het.membership.table_keeper import TableKeeper


class RunStatus(TypedDict):
    """A run's state, plain enough for JSON. Unknown figures are None."""

    generation: int
    """Of the record in force; 0 before the first."""
    state: str
    """forming, running, ended or failed."""
    failure: str | None
    vacant: list[int]
    """Slots without a worker, those aside that have finished."""
    dead_slots: list[int]
    num_joined: dict[int, int]
    """By slot: how many processes have come."""
    table: int
    """Version of the table in force; 0 without one."""
    effective_batch_size: float | None
    fraction_of_aggregate: float | None
    samples_per_s: float | None
    predicted_samples_per_s: float | None
    expected_samples_per_s: float | None
    step: int
    epoch: int
    samples: int
    members: list[dict[str, Any]]
    """By slot: the fields of :class:`~raytrain_het.membership.protocol.Stats`, whether it is ``alive`` (a suspended one
    is, as far as is known, until the run is over) and has ``finished``; and of those that are alive what
    :func:`_of_peer` adds."""


def status(run: RunState, tables: TableKeeper, stats: dict[int, tuple[str, Stats]]) -> RunStatus:
    """How a run stands.

    Args:
        run: who takes part.
        tables: how fast they are, and their shares.
        stats: by slot: the uid of its worker, and what that has said last of itself.
    """
    record, board = run.record, tables.board
    samples = tables.samples(record)
    # Once the run is over nobody waits for a suspended one any more.
    away = [suspended.peer for suspended in run.suspended.values() if not run.over]
    peers = {p.member.slot: p for p in [*away, *run.peers.values()]}
    scores = board.scores(samples)
    solo = {slot: board.solo_samples_per_s(slot, b) for slot, b in samples.items()}
    members = []
    for slot in sorted(set(stats) | set(peers)):
        entry: dict[str, Any] = {"slot": slot, "finished": slot in run.finished_slots, "alive": slot in peers}
        if slot in stats:
            uid, said = stats[slot]
            entry |= msgspec.structs.asdict(said) | {"uid": uid, "told": None}
        if slot in peers:
            entry |= _of_peer(peers[slot], record)
            if peers[slot].member.uid in run.suspended:
                entry["phase"] = "suspended"
            entry |= {"score": scores.get(slot), "solo_samples_per_s": solo.get(slot)}
        members.append(entry)
    return RunStatus(
        generation=record.number if record else 0,
        state=run.phase,
        failure=run.failure,
        vacant=sorted(set(range(run.context.num_slots)) - run.finished_slots - set(peers)),
        dead_slots=sorted(run.dead_slots),
        num_joined=dict(run.num_joined),
        table=record.table if record else 0,
        effective_batch_size=_effective_batch_size(record, samples) if record else None,
        fraction_of_aggregate=fraction_of_aggregate(tables, record),
        samples_per_s=board.samples_per_s,
        predicted_samples_per_s=board.predicted_samples_per_s(samples),
        expected_samples_per_s=board.expected_samples_per_s(samples),
        step=max((m.get("step", 0) for m in members), default=0),
        epoch=max((m.get("epoch", 0) for m in members), default=0),
        samples=max((m.get("global_samples", 0) for m in members), default=0),
        members=members,
    )


def _effective_batch_size(record: Record, samples: dict[int, int]) -> float:
    return effective_batch_size(list(samples.values()), record.gradient_weights, normalised=record.normalised)


def _of_peer(peer: Peer, record: Record | None) -> dict[str, Any]:
    rank = record.rank_of(peer.member.uid) if record else None
    total = sum(record.shares) if record else 0.0
    return {
        "uid": peer.member.uid,
        "device": peer.member.device,
        "node_ip": peer.member.host,
        "healed": peer.healed,
        "phase": peer.phase.value,
        "share": record.shares[rank] / total if record and rank is not None and total else 0.0,
        "lr_scale": record.gradient_weights[rank] if record and rank is not None else None,
        "codec": record.codecs[rank] if record and rank is not None else None,
    }


def fraction_of_aggregate(tables: TableKeeper, record: Record | None) -> float | None:
    """What all do together over the sum of what each would do by itself. Workers without samples do not count."""
    board, samples = tables.board, tables.samples(record)
    together, alone = board.samples_per_s, [board.solo_samples_per_s(s, b) for s, b in samples.items() if b > 0]
    known = [speed for speed in alone if speed is not None]
    return together / sum(known) if together is not None and known and len(known) == len(alone) else None
