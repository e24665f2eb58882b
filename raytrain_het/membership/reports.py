"""Reports on the hub's side: pure bookkeeping. Each report has a key, so that nothing counts twice."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from raytrain_het.membership.audit import difference
from raytrain_het.membership.merging import add_up, mixed_up, reduce_metrics
from raytrain_het.membership.message_parts import LoopProgress
from raytrain_het.membership.protocol import Report
from raytrain_het.membership.skipped_reports import Order, SkippedReports, order

MAX_REPORTS = 1000
"""So many of the last whole reports are kept; their readers ask for them every second or so."""


@dataclass
class _Part:
    """One worker's part of a report."""

    uid: str
    said: Report
    holds_snapshot: bool
    """Whether the worker is still there with the snapshot for the report's checkpoint."""


@dataclass
class _OpenReport:
    step: int
    epoch: int
    parts: dict[int, _Part] = field(default_factory=dict)
    checkpoint_wanted: bool = True
    checkpoint: str | None = None
    checkpoint_error: str | None = None

    @property
    def waits_for_checkpoint(self) -> bool:
        """Whether its checkpoint was neither stored nor failed."""
        return self.checkpoint_wanted and self.checkpoint is None and self.checkpoint_error is None

    def said(self) -> dict[int, Report]:
        """By slot, the messages."""
        return {slot: part.said for slot, part in self.parts.items()}

    def holders(self, slots: Collection[int]) -> list[int]:
        """Those of these slots that hold a snapshot for its checkpoint."""
        return sorted(slot for slot, part in self.parts.items() if part.holds_snapshot and slot in slots)


@dataclass(kw_only=True)
class WholeReport:
    """A report of all workers: a line of ``metrics.jsonl``."""

    seq: int
    """Grows by one with every report."""
    key: str
    step: int
    epoch: int
    metrics: dict[str, Any]
    since_last: dict[str, float]
    """What all have done since the report before."""
    lr: Any
    checkpoint: str | None
    checkpoint_error: str | None
    num_workers: int
    time: float = 0.0
    """When it became whole, seconds since 1970."""
    fraction_of_aggregate: float | None = None
    """What all workers did together over the sum of what each would have done by itself."""

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, as it is stored and shown."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Difference:
    """A report in which replicas differ. It becomes no whole one, since its checkpoint is not a good one."""

    step: int
    what: str


class ReportCollector:
    """Collects every worker's part of each report until it is whole.

    A report is whole when two things hold. Each member has given its part, has gone past it, or is no longer there. And
    its checkpoint is stored, or has failed. A member that has gone past it without a part is an error of the program,
    which :meth:`left_out` words.
    """

    def __init__(self, first_seq: int = 0) -> None:
        self._next_seq = first_seq
        self._open: dict[str, _OpenReport] = {}
        self._done: deque[WholeReport] = deque(maxlen=MAX_REPORTS)
        self._unacknowledged: dict[str, WholeReport] = {}
        self._acknowledged: dict[str, None] = {}
        self._last_order: dict[int, Order] = {}
        self._out_of_date: dict[int, Order] = {}
        """By slot: parts up to this one are of steps that the others may have done again without it."""
        self._skipped = SkippedReports()

    @property
    def has_open_reports(self) -> bool:
        """Whether a report waits for parts, or for its checkpoint."""
        return bool(self._open)

    def add_part(self, slot: int, uid: str, said: Report) -> str | None:
        """A worker's part. Returns the key if the worker need not keep it: it was acknowledged long ago, or is of no
        use."""
        key = said.key
        self._skipped.called(slot, key, said.told)
        if key in self._acknowledged or order(key) <= self._out_of_date.get(slot, ()):
            return key
        if key in self._unacknowledged:
            return None
        report = self._open.setdefault(key, _OpenReport(said.step, said.epoch))
        report.parts[slot] = _Part(uid, said, said.holds_snapshot)
        report.checkpoint_wanted = said.checkpoint
        self._last_order[slot] = order(key)
        return None

    def note_progress(self, slot: int, progress: LoopProgress | None) -> None:
        """A worker has said how far its loop is, and what it reported last: so it shows whether it left one out."""
        self._skipped.note_progress(slot, progress)

    def left_out(self) -> str | None:
        """Says who called ``report()`` where, who went on without, and the fix; None as long as all do the same."""
        for key in sorted(self._open, key=order):
            passed = self._skipped.without(key, self._open[key].parts)
            if passed:
                others = ", and ".join(f"worker {slot} {how}" for slot, how in sorted(passed.items()))
                return (
                    f"{self._called(key)}, and not by all: {others}. Every worker calls report() at the same places, "
                    "since metrics are averaged over all of them and one writes the checkpoint. Take het.report(...) "
                    "out of what not every worker does, such as `if rank == 0:`, and out of the loop over batches if "
                    "shares come in several passes (micro_batch_size): its body runs once for each."
                )
        return None

    def mixed_up(self) -> str | None:
        """The same for parts of one report that cannot be merged."""
        for key, report in self._open.items():
            if mixed := mixed_up(report.said()):
                return (
                    f"{self._called(key)} with what cannot be merged: {mixed}. Call report() with the same kinds of "
                    "metrics, `reduce` and `checkpoint` on every worker."
                )
        return None

    def _called(self, key: str) -> str:
        report = self._open[key]
        where = next((f" at {said.at}" for said in report.said().values() if said.at), "")
        return f"report() was called at step {report.step}{where} by {_workers(report.parts)}"

    def checkpoint_stored(self, key: str, path: str | None, error: str | None) -> None:
        """The writer has stored the checkpoint of a report, or failed to."""
        report = self._open.get(key)
        if report is not None and report.checkpoint is None:
            report.checkpoint, report.checkpoint_error = path, error

    def uids(self, key: str) -> list[str]:
        """The members that have given their part: they hold a state of their own for the checkpoint."""
        return [part.uid for part in self._open[key].parts.values()]

    def writer_wanted(self, slots: Collection[int], present: Collection[int] = ()) -> dict[str, int]:
        """For each report that waits for its checkpoint only: the slot that should write it.

        Args:
            slots: of the current members.
            present: also of those that have yet to catch up. The others may wait for a checkpoint in the middle of a
                step, and that for these.
        """
        wanted = {}
        for key, report in self._open.items():
            if self._missing(key, slots):
                continue
            writers = report.holders(slots) or report.holders(present)
            if report.waits_for_checkpoint and writers:
                wanted[key] = writers[0]
        return wanted

    def waiting_for_storage(self, slot: int) -> set[str]:
        """Open reports whose checkpoint a slot holds a snapshot of."""
        return {key for key, report in self._open.items() if report.holders([slot])}

    def are_open(self, keys: Iterable[str]) -> bool:
        """Whether any of these reports is not whole yet."""
        return any(key in self._open for key in keys)

    def are_under_way(self, slots: Collection[int]) -> bool:
        """Whether something is being done about a report that needs no worker's training function: its checkpoint is
        written, or it is being registered."""
        return bool(self._unacknowledged) or any(not self._missing(key, slots) for key in self._open)

    def settle(
        self, slots: Collection[int], *, present: Collection[int] = (), ended: bool = False
    ) -> list[WholeReport | Difference]:
        """Reports that have become whole, oldest first.

        Args:
            slots: of the current members.
            present: also of those that have yet to catch up, which may hold the only snapshot of a report.
            ended: whether the run has ended, so that no more parts come.
        """
        settled: list[WholeReport | Difference] = []
        for key in sorted(self._open, key=order):
            report = self._open[key]
            is_being_stored = report.waits_for_checkpoint and report.holders({*slots, *present})
            if self._missing(key, slots) and not ended or is_being_stored:
                break
            del self._open[key]
            audits = {slot: said.audit for slot, said in report.said().items() if said.audit is not None}
            if len(audits) > 1 and (what := difference(audits)) is not None:
                settled.append(Difference(report.step, what))
                continue
            whole = self._whole(key, report)
            self._next_seq += 1
            self._done.append(whole)
            self._unacknowledged[key] = whole
            settled.append(whole)
        return settled

    def _whole(self, key: str, report: _OpenReport) -> WholeReport:
        parts = [said for _, said in sorted(report.said().items())]
        lost = "every worker that held the snapshot was lost before it was stored, or does not answer"
        return WholeReport(
            seq=self._next_seq,
            key=key,
            step=report.step,
            epoch=report.epoch,
            metrics=reduce_metrics(parts),
            since_last=add_up(parts),
            lr=parts[0].lr,
            checkpoint=report.checkpoint,
            checkpoint_error=lost if report.waits_for_checkpoint else report.checkpoint_error,
            num_workers=len(parts),
        )

    def _missing(self, key: str, slots: Collection[int]) -> list[int]:
        """Current members that have neither given their part nor gone past it."""
        parts = self._open[key].parts
        passed = self._skipped.without(key, parts)
        return [s for s in slots if s not in parts and s not in passed and self._last_order.get(s, ()) < order(key)]

    def forget(self, slot: int) -> None:
        """A slot's process is gone, with the snapshots it held; a new one in its place starts from nothing."""
        self._last_order.pop(slot, None)
        self._out_of_date.pop(slot, None)
        self._skipped.forget(slot)
        for report in self._open.values():
            if slot in report.parts:
                report.parts[slot].holds_snapshot = False

    def joined(self, slot: int, life: int, step: int) -> None:
        """A slot's process takes part after this step: no part of a report up to this step is expected of it."""
        from_here = (life, step, sys.maxsize)
        self._last_order[slot] = max(self._last_order.get(slot, ()), from_here)
        if slot in self._out_of_date:
            self._out_of_date[slot] = from_here

    def came_back(self, slot: int) -> None:
        """The others have gone on without a slot's process: until it takes part again, what it reports is of a state
        that only it has had."""
        self._out_of_date[slot] = (sys.maxsize,)

    def untaken(self) -> list[WholeReport]:
        """Whole reports that nobody has acknowledged, oldest first."""
        return list(self._unacknowledged.values())

    def acknowledge(self, keys: list[str]) -> None:
        """The asker has stored these reports."""
        for key in keys:
            if self._unacknowledged.pop(key, None) is not None:
                self._acknowledged[key] = None
        for key in list(self._acknowledged)[:-MAX_REPORTS]:
            del self._acknowledged[key]

    def acknowledged(self) -> list[str]:
        """Keys of the last reports that were acknowledged."""
        return list(self._acknowledged)

    def since(self, seq: int) -> list[WholeReport]:
        """All whole reports from a sequence number on."""
        return [r for r in self._done if r.seq >= seq]


def _workers(slots: Iterable[int]) -> str:
    """``worker 0``, ``workers 0, 2``."""
    listed = sorted(slots)
    return f"worker{'s' * (len(listed) > 1)} {', '.join(map(str, listed))}"
