"""Which table of shares and rates a run has: what workers took for their steps goes in, a better table comes out."""

from __future__ import annotations

from raytrain_het.balance.auto_compression import Compression
from raytrain_het.balance.batch_shares import apportion
from raytrain_het.balance.scoreboard import Scoreboard, Table
from raytrain_het.membership.protocol import Timing
from raytrain_het.membership.record import Record
from raytrain_het.membership.settings import HubSettings
from raytrain_het.membership.state import Membership


class TableKeeper:
    """Stands between a run's scoreboard, which knows speeds, and its membership, which knows who takes part."""

    def __init__(self, settings: HubSettings, core: Membership) -> None:
        self.board = Scoreboard(
            alpha=settings.alpha,
            balance=settings.balance,
            shares=settings.shares,
            spares=settings.warm_spares,
            policy=settings.score_policy,
            compression=(
                Compression(settings.compression_error, hierarchy=settings.hierarchy)
                if settings.compression_error is not None
                else None
            ),
        )
        self._core = core
        self._follows = bool(settings.balance or settings.alpha or self.board.compression)
        core.table_for = self._table_for

    def observe(self, slot: int, global_batch_size: int, steps: list[tuple[int, float, float]], now: float) -> None:
        """What a worker took for its steps may make another table better than the one in force."""
        board, core = self.board, self._core
        board.global_batch_size = global_batch_size
        for samples, own_s, cycle_s in steps:
            board.observe(slot, samples, own_s, cycle_s)
        record = core.record
        if record is None:
            return
        if core.forming or record.unhealed or record.fresh or not self._follows:
            board.round_is_over(m.slot for m in record.members if m.uid not in record.unhealed)
            return
        self._adopt_predecessors()
        slots, leaders = [m.slot for m in record.members], record.leaders if record.is_hierarchical else []
        board.place(
            {m.slot: m.host for m in record.members}, dict(zip(slots, (slots[k] for k in leaders), strict=False))
        )
        try:
            table = board.better([m.slot for m in record.members], self.samples(record))
        except ValueError as error:  # A run that is under way goes on as it is.
            core.keep_table(str(error), now)
            return
        if table is not None:
            core.follow(table, now)

    def heard_of_messages(self, slot: int, told: Timing) -> None:
        """How long a worker's messages were on the way, and how much of them its codec has lost."""
        if (sent := told.paths) is not None:
            self.board.observe_paths(slot, {peer: (part, s) for peer, part, s in sent.to}, sent.gradient_bytes)
        if self.board.compression is not None:
            for word, error in told.errors:
                self.board.compression.observe_error(slot, word, error)

    def samples(self, record: Record | None) -> dict[int, int]:
        """By slot: samples of a full global batch."""
        if record is None:
            return {}
        counts = apportion(self.board.global_batch_size, record.shares)
        return {m.slot: b for m, b in zip(record.members, counts, strict=True)}

    def _table_for(self, slots: list[int]) -> Table | None:
        self._adopt_predecessors()
        return self.board.fitting(slots)

    def _adopt_predecessors(self) -> None:
        """After a restart, the table of this actor's predecessor is the one in force."""
        if self.board.table is None:
            self.board.table = self._core.table
