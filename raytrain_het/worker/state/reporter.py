"""Reports: metrics and a snapshot, handed over keyed by step, repeated until acknowledged.

Never holds training on a barrier.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

from raytrain_het.membership import protocol
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.events import CheckpointFailed
from raytrain_het.membership.message_parts import LoopProgress
from raytrain_het.membership.record import Record
from raytrain_het.worker.state.report_keys import Keys
from raytrain_het.worker.state.writing import Writer

logger = logging.getLogger("raytrain_het")

NUM_HOLDERS = 2
"""So many members keep a snapshot until it is stored, so that a dying writer takes no checkpoint with it."""
MAX_UNACKNOWLEDGED = 2


@dataclass
class OpenReport:
    """A report on its way."""

    key: str
    """See :meth:`Reporter.next_key`."""
    step: int
    message: protocol.Report
    meta: dict[str, Any]
    snapshot: dict[str, Any] | None
    record: Record
    stored: protocol.Stored | None = None
    sent: bool = False
    writing: bool = False


class Reporter:
    """Holds this worker's part of each report until the hub has acknowledged it.

    Args:
        agent: speaks with the hub.
        writer: writes checkpoints.
        storage_limit_s: after so long a checkpoint that is not stored is skipped.
    """

    def __init__(self, agent: MemberAgent, writer: Writer, *, storage_limit_s: float) -> None:
        self._agent, self._writer, self._storage_limit_s = agent, writer, storage_limit_s
        self._open: dict[str, OpenReport] = {}
        self._confirmed = 0
        self._keys = Keys()
        self._returning = False
        self._lock = threading.Lock()
        self._overdue: list[int] = []
        """Steps of the checkpoints that were skipped while the storage still takes them."""
        agent.on_message[protocol.Acknowledged] = self._acknowledged
        agent.on_message[protocol.Write] = self._write_asked

    def begins(self, life: int, step: int) -> None:
        """This worker's loop begins: reports of this step and those after it are its business too."""
        self._keys.begins(life, step)

    def went_on(self, life: int, step: int) -> None:
        """Its loop has committed a step."""
        self._keys.went_on(life, step)

    def told(self, *, complete: bool = False) -> LoopProgress | None:
        """What the hub sees from that this worker has left a report out; ``complete``: its loop is at its end."""
        return self._keys.told(complete=complete)

    def next_key(self, record: Record, step: int, body: object = None) -> str:
        """The key of the next report made at this step: ``<life>.<step>.<ordinal>``, the same on all workers.

        Where all began again from a checkpoint, the same step is reported once more, in another life. ``body`` is the
        step that is open, if one is: where it is done again its reports are the same as before.
        """
        return self._keys.next(record.life, step, body)

    def has(self, key: str) -> bool:
        """Whether this report is on its way already: it was made when its step was done before."""
        return key in self._open

    def add(self, report: OpenReport, own_state: dict[str, Any]) -> None:
        """Take a report; it is sent once its step is confirmed.

        Waits while too many snapshots are being stored. Those that are not sent yet do not count: they go with the next
        step, which would not come.
        """
        doing = f"in report() at step {report.step}, waiting for the checkpoints of earlier reports to be stored"
        with self._agent.doing.call("report", doing):
            self._agent.wait_for_peers(lambda: report.snapshot is None or self._num_stored_now() < MAX_UNACKNOWLEDGED)
        self._open[report.key] = report
        self._writer.offer(report.key, own_state)
        self.send_up_to(self._confirmed)

    def _num_stored_now(self) -> int:
        return sum(report.sent and report.snapshot is not None for report in list(self._open.values()))

    def send_up_to(self, step: int, *, force: bool = False) -> None:
        """All reports up to this step may go: their step is committed everywhere."""
        self._confirmed = max(self._confirmed, step)
        for report in list(self._open.values()):
            if not report.sent and (force or report.step <= self._confirmed):
                report.sent = True
                self._agent.tell(report.message)

    def resend(self) -> None:
        """The hub is a new one: tell it again what has not been acknowledged."""
        if self._returning and self._open:
            self._agent.tell(protocol.Returning())
        for report in list(self._open.values()):
            if report.sent:
                self._agent.tell(report.message)
                if report.stored is not None:
                    self._agent.tell(report.stored)

    def flush(self) -> None:
        """The function has returned: send what is left, and wait until every report is acknowledged."""
        self.send_up_to(self._confirmed, force=True)
        self._returning = True
        if self._open:
            self._agent.tell(protocol.Returning())
        self.wait()

    def wait(self) -> None:
        """Wait until every report is acknowledged."""
        step, waiting = self._agent.cursor.step, ", ".join(str(report.step) for report in list(self._open.values()))
        doing = f"after step {step}, waiting for its reports of steps {waiting} to be stored"
        with self._agent.doing.call("returned", doing):
            self._agent.wait_for_peers(lambda: not self._open)

    def _acknowledged(self, message: protocol.Acknowledged) -> None:
        with self._agent.condition:
            for key in message.keys:
                report = self._open.pop(key, None)
                if report is not None:
                    self._writer.withdraw(key)
            self._agent.condition.notify_all()

    def _write_asked(self, message: protocol.Write) -> None:
        report = self._open.get(message.key)
        if report is not None and report.snapshot is not None and not report.writing:
            report.writing = True
            if self._overdue:
                self._over(report, None, f"the storage still has not taken that of step {self._overdue[0]}")
                return
            threading.Thread(
                target=self._write, args=(report, report.snapshot, message.uids), name="het-checkpoint", daemon=True
            ).start()

    def _write(self, report: OpenReport, snapshot: dict[str, Any], uids: list[str]) -> None:
        """Write and store the checkpoint. A failure costs this checkpoint, never an older one, and never the run."""
        name = "checkpoint_{:09d}_{}".format(*map(int, report.key.split(".")[1:]))
        timer = threading.Timer(self._storage_limit_s, lambda: self._skip(report))
        timer.daemon = True
        timer.start()
        path, error = None, None
        try:
            members = [m for m in report.record.members if m.uid in uids]
            path = self._writer.write(name, report.meta, snapshot, members)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        timer.cancel()
        self._overdue = [step for step in self._overdue if step != report.step]
        self._over(report, path, error)

    def _skip(self, report: OpenReport) -> None:
        """The storage takes too long. What it has not taken fills this worker's memory: no other one is begun."""
        self._overdue = [*self._overdue, report.step]
        limit = f"HetConfig(storage_limit_s={self._storage_limit_s:g})"
        self._over(report, None, f"the storage has not taken it within {limit}")

    def _over(self, report: OpenReport, path: str | None, error: str | None) -> None:
        """The checkpoint is stored, or is given up. The first word counts, unless it is stored after all: then a run
        that resumes may go on from it."""
        with self._lock:
            if report.stored is not None and (path is None or report.stored.path is not None):
                return
            cursor = Cursor.from_dict(report.meta["cursor"])
            report.stored = protocol.Stored(key=report.key, path=path, error=error, cursor=cursor)
        if error is not None:
            logger.warning("the checkpoint of step %d could not be stored, the run goes on: %s", report.step, error)
            self._agent.tell(protocol.Event(event=CheckpointFailed(step=report.step, error=error)))
        self._agent.tell(report.stored)
