"""What the next record says: a generation's members, what they go on from, and what the table in force gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytrain_het.balance.owner_shards import owner_parts
from raytrain_het.balance.scoreboard import Table
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.peers import Lag, Peer
from raytrain_het.membership.record import Record
from raytrain_het.membership.state import RunState


@dataclass(frozen=True)
class Base:
    """What all members of a generation go on from."""

    cursor: Cursor
    source: str
    """Uid of the member that holds this state."""
    reset: bool
    """Whether no member holds a state, so that all load the checkpoint or begin anew."""


def next_record(run: RunState, peers: Sequence[Peer], base: Base, behind: Lag) -> Record:
    """The record of the generation that is being formed.

    Args:
        run: the run; it is only read here.
        peers: the generation's members, by slot.
        base: what they go on from.
        behind: what each misses of it.
    """
    config, table, number, previous = run.config, run.table, run.next.number, run.record
    members = tuple(p.member for p in peers)
    same_group = previous is not None and not run.next.voided and not base.reset and previous.members == members
    speeds = _speeds_of(table, peers)
    return Record(
        number=number,
        incarnation=run.incarnation,
        group=previous.group if previous is not None and same_group else f"{run.incarnation}.{number}",
        life=run.incarnation // 1_000_000 + number if previous is None or base.reset else previous.life,
        members=members,
        shares=_shares_of(table, config.given_shares, peers),
        gradient_weights=_gradient_weights_of(table, peers),
        normalised=config.lr_scale_normalisation == "mean",
        table=table.version if table else 0,
        speeds=speeds,
        owners=_owners_of(table, speeds, peers),
        codecs=_codecs_of(table, config.codecs_for(run.context.num_slots), peers),
        hierarchy=_hierarchy_of(table, config.given_hierarchy),
        cursor=base.cursor,
        source=base.source,
        behind=behind.behind,
        unhealed=behind.unhealed,
        fresh=behind.fresh,
        reset=base.reset,
        checkpoint=run.checkpoint if base.reset else None,
        backend=config.backend,
        reason=run.next.reason,
    )


def _shares_of(table: Table | None, given: Sequence[float] | None, peers: Sequence[Peer]) -> tuple[float, ...]:
    """``given`` by slot, else the table's, else equal; 0 for whoever is not healed.

    Where that leaves nothing, those that are healed share equally.
    """
    if given:
        by_slot = dict(enumerate(given))
    else:
        by_slot = {slot: float(b) for slot, b in table.shares.items()} if table else {}
    shares = [s if p.healed else 0.0 for s, p in zip(_by_slot(by_slot, peers), peers, strict=True)]
    if sum(shares) == 0:
        shares = [1.0 if p.healed else 0.0 for p in peers]
    return tuple(shares)


def _gradient_weights_of(table: Table | None, peers: Sequence[Peer]) -> tuple[float, ...]:
    """The table's gradient weights, 1 without a table."""
    return tuple(_by_slot(table.gradient_weights if table else {}, peers))


def _speeds_of(table: Table | None, peers: Sequence[Peer]) -> tuple[float, ...]:
    """The table's scores, 1 without a table."""
    return tuple(_by_slot(table.scores if table else {}, peers))


def _owners_of(table: Table | None, speeds: Sequence[float], peers: Sequence[Peer]) -> tuple[float, ...]:
    """Which part of the gradient each sums, see :func:`owner_parts`; nothing for whoever is not healed."""
    links = table.links_of(p.member.slot for p in peers) if table is not None else []
    healed = [s if p.healed else 0.0 for s, p in zip(speeds, peers, strict=True)]
    return tuple(owner_parts(healed, links, table.unhurried_s if table is not None else 0.0))


def _codecs_of(table: Table | None, given: Sequence[str], peers: Sequence[Peer]) -> tuple[str, ...]:
    """The table's codecs; ``given`` by slot without a table of them."""
    if table is None or not table.codecs:
        return tuple(given[p.member.slot % len(given)] for p in peers)
    return tuple(table.codecs_of((p.member.slot for p in peers), given[0]))


def _hierarchy_of(table: Table | None, given: bool | None) -> bool:
    """The table's, where it is not given."""
    return given if given is not None else table is not None and table.hierarchy


def table_of(record: Record, *, codecs_chosen: bool = False) -> Table | None:
    """The table that a record follows, as far as it can be seen from there: who is healing has a share of 0 for now.

    Args:
        record: the generation's.
        codecs_chosen: whether its codecs are the table's, and not given.
    """
    if record.table == 0:
        return None
    slots = {m.slot: rank for rank, m in enumerate(record.members)}
    return Table(
        version=record.table,
        scores={slot: record.speeds[rank] for slot, rank in slots.items()},
        gradient_weights={slot: record.gradient_weights[rank] for slot, rank in slots.items()},
        shares={m.slot: round(record.shares[slots[m.slot]]) for m in record.members if m.uid not in record.unhealed},
        predicted_step_s=None,
        codecs={slot: record.codecs[rank] for slot, rank in slots.items()} if codecs_chosen else {},
        hierarchy=codecs_chosen and record.hierarchy,
        reason="the membership actor was restarted",
    )


def _by_slot(values: Mapping[int, float], peers: Sequence[Peer]) -> list[float]:
    """A value per peer; the mean of the others for who is not in the table."""
    mean = sum(values.values()) / len(values) if values else 1.0
    return [values.get(p.member.slot, mean) for p in peers]
