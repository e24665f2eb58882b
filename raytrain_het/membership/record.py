"""The record of a generation: the single source of what all its members must agree on."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from raytrain_het.membership.cursor import Cursor


@dataclass(frozen=True, kw_only=True)
class Member:
    """One worker process, as its peers see it."""

    uid: str
    """Unique for the life of the process: ``"<slot>-<hex>"``. A refilled slot has a new one."""
    slot: int
    """The world rank: the slot's number, constant through refills."""
    host: str
    """Address at which peers reach it."""
    state_port: int
    """Port of its state server, from which an unhealed member takes snapshots."""
    device: str
    """Its device, as torch writes it."""
    watch_port: int = 0
    """Port of its watchman, which knows how its process is; 0 if it has none."""
    kind: str = ""
    """What its arithmetic depends on, in words: members of one kind round alike."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a generation is. Two members never act on different records in one step."""

    number: int
    """Grows by one with every generation of the run and is never reused, restarts of the actor included."""
    incarnation: int
    """Which life of the membership actor formed it."""
    group: str
    """Names the process group. An unchanged member list keeps its predecessor's."""
    life: int = 0
    """Grows whenever all begin anew, from a checkpoint or from nothing. Steps that are done a second time then are also
    reported and evaluated a second time."""
    members: tuple[Member, ...]
    """In rank order (the rank inside the group, not the world rank)."""
    shares: tuple[float, ...]
    """Relative batch shares by rank; 0 for those that are not healed."""
    gradient_weights: tuple[float, ...]
    """By rank: ``r_i`` weighs a member's gradient beside its samples."""
    normalised: bool
    """Whether weighted sums of gradients are divided by the sum of weights."""
    table: int
    """Version of the table that shares and gradient weights are from; 0 before there was one."""
    speeds: tuple[float, ...] = ()
    """The table's relative speeds by rank: a new actor goes on with the table."""
    owners: tuple[float, ...]
    """Relative sizes of the owner shards by rank: a faster member adds up more of the gradient. 0 for those that are
    not healed."""
    codecs: tuple[str, ...]
    """Codec by which each rank encodes what it sends."""
    hierarchy: bool = False
    """Whether gradients of members on one host are added up there first."""
    cursor: Cursor
    """Position after the base step, from which all go on."""
    source: str | None
    """Uid of the member that holds the base step: it serves snapshots and kept sums."""
    behind: tuple[str, ...]
    """Healed members that have yet to replay the base step from the source's kept sums."""
    unhealed: tuple[str, ...]
    """Members that take a snapshot of the source while the others train."""
    fresh: tuple[str, ...]
    """Members that have just healed by replay and now verify it against the source."""
    reset: bool
    """Nobody was healed: all start from ``checkpoint``, or from the source's state at step 0."""
    checkpoint: str | None
    """The checkpoint that a reset loads."""
    backend: str
    """"tcp" or "nccl", as ``HetConfig.backend`` says."""
    reason: str
    """Why this generation was formed, for people."""

    @property
    def base(self) -> int:
        """The last step that counts as committed when this generation starts."""
        return self.cursor.step

    def has_to_be_handed_over(self, step: int) -> bool:
        """Whether some members begin with this step by taking its sums over, or by loading what all begin with."""
        return bool(self.behind or self.reset) and step == self.base

    @property
    def is_unlike(self) -> bool:
        """Whether members may differ by rounding."""
        return len({m.kind for m in self.members}) > 1

    @property
    def leaders(self) -> list[int]:
        """By rank, the rank of the member that adds up gradients on its host and sends the sum on.

        It is the healed member that owns most; among equals the one with the largest share, then the first.
        """

        def standing(rank: int) -> tuple[bool, float, float]:
            return self.members[rank].uid not in self.unhealed, self.owners[rank], self.shares[rank]

        first: dict[str, int] = {}
        for rank, member in enumerate(self.members):
            leader = first.setdefault(member.host, rank)
            if standing(rank) > standing(leader):
                first[member.host] = rank
        return [first[member.host] for member in self.members]

    @property
    def is_hierarchical(self) -> bool:
        """Whether gradients are added up on hosts first: it is wanted, and one host of several has several members."""
        return self.hierarchy and 1 < len({m.host for m in self.members}) < len(self.members)

    def rank_of(self, uid: str) -> int | None:
        """The group rank of a member, or None."""
        return self._ranks.get(uid)

    @functools.cached_property
    def _ranks(self) -> dict[str, int]:
        return {member.uid: rank for rank, member in enumerate(self.members)}

    @property
    def source_rank(self) -> int:
        """The rank of the member that serves the others.

        Raises:
            ValueError: nobody does.
        """
        rank = self.rank_of(self.source) if self.source is not None else None
        if rank is None:
            raise ValueError(f"generation {self.number} has no source among its members: source={self.source!r}")
        return rank

    def member(self, uid: str) -> Member:
        """The member with this uid."""
        return self.members[self._ranks[uid]]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that survives JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """The inverse of :meth:`to_json`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        values["members"] = tuple(Member(**m) for m in data["members"])
        values["cursor"] = Cursor.from_dict(data["cursor"])
        return cls(**values)
