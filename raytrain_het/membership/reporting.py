"""Reports of a run under way: who must give a part, who writes the checkpoint, and who may leave meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

from raytrain_het.membership import audit, events, protocol
from raytrain_het.membership.logic import Membership
from raytrain_het.membership.reports import Difference, ReportCollector
from raytrain_het.membership.status import fraction_of_aggregate
from raytrain_het.membership.table_keeper import TableKeeper


class Reporting:
    """Stands between the members, which report, and the book of their reports.

    Args:
        core: who takes part; it is told of calls that only some workers make.
        tables: how well the fleet is used, for reports that are whole.
        send: sends a message to the member with a uid.
    """

    def __init__(self, core: Membership, tables: TableKeeper, send: Callable[[str, protocol.Message], None]) -> None:
        self.collector = ReportCollector(first_seq=core.run.incarnation // 1_000_000)
        self.leaving: dict[str, set[str]] = {}
        """By uid, members that want to leave: the reports whose snapshots they hold."""
        self._core, self._tables, self._send = core, tables, send
        self._writers: dict[str, int] = {}
        """By report, the slot that was asked to write its checkpoint."""
        self._expected: set[str] = set()
        """Uids of the members that the book expects parts of."""
        self._warned = False
        """Whether it was said that not all workers make the same calls."""
        self._misused = False
        """Whether the run has failed by such calls."""

    def add_part(self, uid: str, slot: int, report: protocol.Report) -> None:
        """A member has given its part of a report."""
        known = self.collector.add_part(slot, uid, report)
        if known is not None:
            self._send(uid, protocol.Acknowledged(keys=[known]))

    def stored(self, slot: int, key: str, path: str | None, error: str | None) -> None:
        """A member has stored the checkpoint of a report, or failed to.

        Where another one has been asked meanwhile, what has failed here may be the other one's success: who has stored
        a checkpoint clears away what others have staged for it.
        """
        if path is not None or self._writers.get(key, slot) == slot:
            self.collector.checkpoint_stored(key, path, error)

    def acknowledge(self, keys: list[str]) -> None:
        """These reports are registered, and the workers may forget them."""
        self.collector.acknowledge(keys)
        message = protocol.Acknowledged(keys=keys)
        for uid in self._core.run.peers if keys else ():
            self._send(uid, message)

    def came_back(self, uid: str, slot: int, *, missed: bool) -> None:
        """A member was suspended, and is heard again: nobody has told it which reports were registered meanwhile.

        Args:
            uid: the member's.
            slot: too.
            missed: whether generations were formed without it.
        """
        if missed:
            self.collector.came_back(slot)
        if keys := self.collector.acknowledged():
            self._send(uid, protocol.Acknowledged(keys=keys))

    def is_under_way(self) -> bool:
        """Whether something is being done about a report that needs no worker's training function."""
        return self.collector.are_under_way(self._slots())

    def let_leave_when_stored(self, uid: str, slot: int) -> None:
        """A member wants to leave. It stays until the snapshots that it holds are stored.

        The other worker that holds one may be killed meanwhile.
        """
        self.leaving.setdefault(uid, self.collector.waiting_for_storage(slot))

    def free_to_leave(self) -> list[str]:
        """Uids of the members that wanted to leave, and now may: each is returned once."""
        if self._misused:
            return []
        here = self._core.run.peers
        free = [uid for uid, keys in self.leaving.items() if uid in here and not self.collector.are_open(keys)]
        for uid in free:
            del self.leaving[uid]
        return free

    def connected(self, slot: int) -> None:
        """A slot's process has connected, perhaps again: what it was asked may have been lost."""
        self._writers = {key: writer for key, writer in self._writers.items() if writer != slot}

    def forget(self, slot: int) -> None:
        """A slot's process is gone, with the snapshots it held."""
        self.collector.forget(slot)
        self.connected(slot)

    def settle(self) -> None:
        """See which reports are whole under the present membership, and who is to write a checkpoint."""
        self._expect_parts()
        self._look_at_calls()
        if self._misused:
            return
        self._ask_for_checkpoints()
        run = self._core.run
        present = [peer.member.slot for peer in run.peers.values()]
        for report in self.collector.settle(self._slots(), present=present, ended=run.over):
            if isinstance(report, Difference):
                self._core.replicas_differ(audit.message(report.step, report.what))
                continue
            report.time = time.time()
            report.fraction_of_aggregate = fraction_of_aggregate(self._tables, self._core.run.record)

    def _slots(self) -> list[int]:
        return [p.member.slot for p in self._core.run.holders()]

    def _expect_parts(self) -> None:
        """From now on new members must give their parts."""
        run = self._core.run
        self._expected &= run.peers.keys()
        for peer in run.holders():
            if peer.member.uid not in self._expected:
                self._expected.add(peer.member.uid)
                self.collector.joined(peer.member.slot, run.life, peer.reports_after)

    def _ask_for_checkpoints(self) -> None:
        uids = {p.member.slot: p.member.uid for p in self._core.run.peers.values()}
        for key, slot in self.collector.writer_wanted(self._slots(), uids).items():
            if self._writers.get(key) not in uids:
                self._writers[key] = slot
                self._send(uids[slot], protocol.Write(key=key, uids=self.collector.uids(key)))

    def _look_at_calls(self) -> None:
        """Fail the run if only some workers make a report, or if its parts cannot be merged.

        Once a worker has come late, or a step was done again, workers that count their steps themselves may call
        report() at different ones. Then the report is of the workers that called it, and one warning says so.
        """
        core, text = self._core, self.collector.mixed_up()
        if text is None and (text := self.collector.left_out()) is not None and core.run.disturbed:
            if not self._warned:
                self._warned = True
                core.run.log.note(events.Warned(text=f"{text} This report is of those that called it."))
            return
        if text is not None and not self._misused:
            self._misused = True
            core.misused(text)
