"""Which table of shares a run has: what workers' steps and messages take goes in, a better table comes out."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from raytrain_het.balance.auto_compression import Compression
from raytrain_het.balance.batch_shares import apportion
from raytrain_het.balance.scoreboard import Scoreboard, Table
from raytrain_het.config import HetConfig
from raytrain_het.membership.message_parts import Known
from raytrain_het.membership.pace import LARGE_FLEET
from raytrain_het.membership.protocol import Timing
from raytrain_het.membership.record import Record
from raytrain_het.membership.state import RunState

JUDGING_PART = 0.02
"""At most this part of the hub's time goes into looking for better tables: with many members a look takes longer."""


class TableKeeper:
    """Stands between a run's scoreboard, which knows speeds, and its membership, which knows who takes part.

    Args:
        config: the run's settings.
        run: who takes part, and the table in force; it is only read here.
        now: a clock, seconds.
    """

    def __init__(self, config: HetConfig, run: RunState, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._judges_again_at = now, 0.0
        error = config.compression_error
        compression = Compression(error, hierarchy=config.given_hierarchy) if error is not None else None
        self.board = Scoreboard(config, compression)
        self._run = run
        self._follows_speeds = config.shares == "auto" or config.alpha != 0 or compression is not None

    def introduce(self, slot: int, known: Known) -> None:
        """A worker has come, with what it knows of its speed."""
        self.board.global_batch_size = known.global_batch_size
        self.board.introduce(slot, known.profile)
        if self.board.compression is not None and known.codecs is not None:
            self.board.compression.introduce(slot, msgspec.structs.asdict(known.codecs))

    def fitting(self, slots: list[int]) -> Table | None:
        """See :meth:`Scoreboard.fitting`."""
        self._adopt_predecessors()
        return self.board.fitting(slots)

    def better(self, slot: int, timing: Timing) -> Table | None:
        """Learn from what a worker's steps took; return a table that is better than the one in force, if there is one.

        Raises:
            ValueError: no other table can be made, for example since ``alpha`` is too large for the scores.
        """
        board, run, record = self.board, self._run, self._run.record
        self._observe(slot, timing)
        if record is None or not board.may_be_over(len(record.members) - len(record.unhealed)):
            return None
        began = self._now()
        if began < self._judges_again_at:
            return None
        try:
            return self._judge(record, run)
        finally:
            self._judges_again_at = began + (self._now() - began) / _judging_part(len(record.members))

    def _judge(self, record: Record, run: RunState) -> Table | None:
        """A round of steps is over."""
        board = self.board
        if run.forming or record.unhealed or record.fresh or not self._follows_speeds:
            board.round_is_over(m.slot for m in record.members if m.uid not in record.unhealed)
            return None
        self._adopt_predecessors()
        slots, leaders = [m.slot for m in record.members], record.leaders if record.is_hierarchical else []
        board.place(
            {m.slot: m.host for m in record.members}, dict(zip(slots, (slots[k] for k in leaders), strict=False))
        )
        return board.better(slots, self.samples(record))

    def _observe(self, slot: int, timing: Timing) -> None:
        """How long a worker's steps and messages took, and how much of its messages its codec has lost."""
        board = self.board
        if (sent := timing.paths) is not None:
            board.observe_paths(slot, {peer: (part, s) for peer, part, s in sent.to}, sent.gradient_bytes)
        if board.compression is not None:
            for word, error in timing.errors:
                board.compression.observe_error(slot, word, error)
        board.global_batch_size = timing.global_batch_size
        for samples, own_s, cycle_s in timing.steps:
            board.observe(slot, samples, own_s, cycle_s)

    def samples(self, record: Record | None) -> dict[int, int]:
        """By slot: samples of a full global batch."""
        if record is None:
            return {}
        counts = apportion(self.board.global_batch_size, record.shares)
        return {m.slot: b for m, b in zip(record.members, counts, strict=True)}

    def _adopt_predecessors(self) -> None:
        """After a restart, the table of an earlier hub is the one in force."""
        if self.board.table is None:
            self.board.table = self._run.table


def _judging_part(num_members: int) -> float:
    """The part of the hub's time that judging may take: less in a fleet of medium size, where :data:`JUDGING_PART`
    would be most of what the hub does at all."""
    return JUDGING_PART if num_members <= LARGE_FLEET else min(JUDGING_PART, num_members / 12_000)
