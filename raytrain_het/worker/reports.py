"""``report()``: this worker's part of a report, made from where it stands."""

from __future__ import annotations

import logging
from typing import Any

from raytrain_het.membership.message_parts import ReplicaAudit
from raytrain_het.membership.protocol import Report as ReportPart
from raytrain_het.membership.record import Record
from raytrain_het.worker.checks.call_site import call_site
from raytrain_het.worker.connections import Connections
from raytrain_het.worker.state.contents import Contents
from raytrain_het.worker.state.metrics import check_metrics, check_reduce
from raytrain_het.worker.state.reporter import NUM_HOLDERS, OpenReport, Reporter
from raytrain_het.worker.state.storage import Identity
from raytrain_het.worker.stats import StatsReporter
from raytrain_het.worker.step.engine import Engine

logger = logging.getLogger("raytrain_het")


class Reports:
    """One worker's.

    Args:
        connections: to the hub.
        engine: where this worker stands.
        contents: what a checkpoint holds.
        reporter: holds this worker's part until it is acknowledged.
        stats: what it has done since its last report.
    """

    def __init__(
        self, connections: Connections, engine: Engine, contents: Contents, reporter: Reporter, stats: StatsReporter
    ) -> None:
        self.reporter = reporter
        self._connections, self._engine, self._contents, self._stats = connections, engine, contents, stats
        self._warned_of_sums = False

    def make(self, metrics: dict[str, Any], epoch: int, *, reduce: dict[str, str] | None, checkpoint: bool) -> None:
        """See :func:`raytrain_het.report`."""
        engine, reporter, contents, agent = self._engine, self.reporter, self._contents, self._connections.agent
        reduce = check_reduce(reduce)
        plain = check_metrics(metrics, reduce)
        agent.check()
        if engine.has_missed_an_epochs_end:
            return  # The others have made this report.
        if engine.body_is_void:
            return  # This body's step was given up: the body runs again.
        cursor, record = engine.cursor, self._connections.record()
        agent.points.reach("report", cursor.step)
        # Not those that healed at the very end of an epoch: they begin with the next one, and do not come here.
        healed = [m.uid for m in record.members if m.uid not in (*record.unhealed, *record.fresh)]
        holds = checkpoint and agent.uid in healed[:NUM_HOLDERS]
        told, key = reporter.told(), reporter.next_key(record, cursor.step, engine.open_body)
        if reporter.has(key):
            return
        self._warn_of_sums(reduce)
        since_last = self._stats.since_report()
        opened = engine.light_when_opened()
        message = ReportPart(
            key=key,
            at=call_site().where,
            told=told,
            step=cursor.step,
            epoch=epoch,
            metrics=plain,
            reduce=reduce,
            samples=since_last["samples"],
            since_last=since_last,
            lr=contents.replica.learning_rate(),
            checkpoint=checkpoint,
            holds_snapshot=holds,
            audit=self._audit(opened) if checkpoint else None,
        )
        about = contents.about(cursor, record, self._identity(record, key))
        report = OpenReport(key, cursor.step, message, about, contents.shared(opened) if holds else None, record)
        reporter.add(report, contents.own(checkpoint=checkpoint))
        self._stats.send()

    def _identity(self, record: Record, key: str) -> Identity:
        return Identity(id=self._connections.hub.run_id, life=record.life, key=key)

    def _audit(self, opened: dict[str, Any] | None) -> ReplicaAudit | None:
        """What the hub compares before a checkpoint is stored."""
        check = self._engine.checks.replica
        if not check.looks:
            return None
        light = opened if opened is not None else self._contents.replica.light()
        position = {"the position in the data": str(list(self._engine.cursor.to_dict().values()))}
        return ReplicaAudit(**check.whole_audit(light, position))

    def _warn_of_sums(self, reduce: dict[str, str]) -> None:
        sums = [name for name, how in reduce.items() if how == "sum"]
        times = self._engine.counters.uncounted
        if sums and times and not self._warned_of_sums:
            self._warned_of_sums = True
            slot = self._connections.agent.member.slot
            self._connections.warn(
                f"report(reduce={{{sums[0]!r}: 'sum'}}): of the times that the loop's body has run on worker "
                f"{slot}, {times} were on samples that do not count (a share of 0, or a step that was done "
                "again). A sum that the body adds up holds them too; for an exact one write "
                "raytrain_het.evaluate(fn, dataset).",
                everybody_says_it=False,
            )
