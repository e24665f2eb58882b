"""The communication thread: one launch order on all members, overlapped with the backward pass.

It enters generations (makes the group, replays the kept sums for whoever is one step behind), runs the jobs the
training thread submits, and follows along by itself while this member is not healed. The training thread never touches
the group.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from raytrain_het.allreduce import points, replay
from raytrain_het.allreduce.codec_states import CodecStates
from raytrain_het.allreduce.fidelity import Fidelity
from raytrain_het.allreduce.jobs import ConfirmJob, Job, ResyncJob, StepJob
from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.path_watch import PathWatch
from raytrain_het.allreduce.patience import Interrupted, Patience
from raytrain_het.allreduce.reducers.exchange import Exchange, Exchanges
from raytrain_het.allreduce.reducers.owner_shards import Traffic, Wire
from raytrain_het.allreduce.rounds import Rounds
from raytrain_het.allreduce.sums import Sums
from raytrain_het.allreduce.transport.building import GroupBuilder
from raytrain_het.allreduce.transport.group import Group, GroupError
from raytrain_het.allreduce.transport.one_to_all import one_to_all
from raytrain_het.allreduce.transport.poller import Poller
from raytrain_het.errors import ProtocolError, RunFailedError
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.meeting import MeetingPlace
from raytrain_het.membership.record import Record

logger = logging.getLogger("raytrain_het")


class Communicator:
    """See the module's text. Public attributes are read under ``agent.condition``."""

    def __init__(
        self,
        agent: MemberAgent,
        layout: Layout,
        *,
        advance: Callable[[Cursor], tuple[Cursor, bool]],
        resync_bytes: int,
        hang_limit_s: float,
        resync_due: Callable[[Record, int], bool] = lambda record, step: False,
    ) -> None:
        self.agent, self.layout = agent, layout
        self._resync_due = resync_due
        self.entered: Record | None = None
        """The generation whose group stands and whose replays are done."""
        self.replayed: tuple[Sums, list[torch.Tensor]] | None = None
        """Sums of the base step that this member had missed, and their values by bucket, for the training thread."""
        self.followed: collections.deque[tuple[Sums, list[torch.Tensor], Cursor]] = collections.deque()
        """While not healed: the sums of the steps gone by, to be replayed on the snapshot."""
        self.followed_to: Cursor | None = None
        self.follow_starts = 0
        """Grows whenever following starts anew."""
        self.codec_states = CodecStates(layout)
        """Read and written by the training thread between steps."""
        self.traffic = Traffic()
        self._outs = [torch.zeros(b.numel, dtype=b.dtype) for b in layout.buckets]
        self._advance, self._resync_bytes = advance, resync_bytes
        self._poller = Poller()
        self.patience = Patience(agent, self._poller, hang_limit_s=hang_limit_s)
        self.paths = PathWatch()
        self.fidelity = Fidelity()
        self._jobs: collections.deque[Job] = collections.deque()
        self._group: Group | None = None
        self._rounds: Rounds | None = None
        self._kept: tuple[int, Callable[[], torch.Tensor]] = (-1, lambda: torch.zeros(0))
        """The last step that this member has the sums of, and how to pack them for one that has not."""
        self._broken = 0
        self._meetings = MeetingPlace(agent)
        agent.position = lambda: self.patience.position
        agent.on_change = self._poller.wake
        self._thread = threading.Thread(target=self._run, name="het-communication", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- the training thread's side

    def submit(self, job: Job) -> None:
        """Queue a job of the generation in force. A job of another one is aborted."""
        self._jobs.append(job)
        self._poller.wake()

    def bucket_ready(self, job: StepJob, count: int) -> None:
        """The first ``count`` buckets of the job are filled."""
        if count == len(self.layout.buckets):
            job.ready_at = time.monotonic()
        if count > job.ready:
            job.ready = count
            self._poller.wake()

    def wires(self, record: Record, epoch: int) -> list[list[Wire] | None] | None:
        """Where gradients of the next step, one of this generation and epoch, can be gathered, by bucket."""
        rounds = self._rounds
        if self.codec_states.flushes:
            return None
        return rounds.exchanges.at(epoch).wires if rounds is not None and rounds.exchanges.record is record else None

    def of_messages(self) -> dict[str, Any]:
        """What the hub is told of them: how long they were on the way, and what codecs have lost of them."""
        return {"paths": self.paths.take(), "errors": self.fidelity.take()}

    def close(self) -> None:
        """Stop the thread, which leaves the group."""
        self.patience.closed = True
        self._poller.wake()
        self._thread.join(timeout=2)

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        torch.set_num_threads(1)  # Its tensor work is copies and sums; a pool of its own would fight the training's.
        try:
            while not self.patience.closed:
                if not self._turn():
                    self._poller.wait(1.0)
        except BaseException as error:
            # Not a peer's fault, and nobody would see it: pings are answered by another thread.
            logger.exception("the communication thread of worker %d has failed", self.agent.member.slot)
            with self.agent.condition:
                self.agent.gone = self.agent.gone or RunFailedError(
                    f"the communication thread of worker {self.agent.member.slot} has failed: "
                    f"{type(error).__name__}: {error}. This is a bug in raytrain_het, or memory has run out: its "
                    "traceback is in this worker's log."
                )
                self.agent.condition.notify_all()
        finally:
            self._leave_group()
            self._poller.close()

    def _turn(self) -> bool:
        """Do the next thing there is to do; False if there is nothing."""
        record, entered, void = self.agent.record, self.entered, self.agent.void
        newer = record is not None and (entered is None or record.number > entered.number)
        if record is not None and newer and void <= record.number > self._broken:
            self._abort_jobs(before=record.number)
            self._guard(lambda: self._enter(record), record.number)
            return True
        if entered is None:
            return False
        if void > entered.number or self._broken >= entered.number:
            self._leave_group()
        if self.patience.interrupted(entered.number) or self._broken >= entered.number:
            self._abort_jobs(before=entered.number + 1)
            return False
        if self.agent.uid in entered.unhealed:
            self._follow(entered)
            return True
        job = self._next_job(entered)
        if job is not None:
            self._perform(job)
        return job is not None

    def _next_job(self, entered: Record) -> Job | None:
        while self._jobs:
            job = self._jobs.popleft()
            if job.generation == entered.number:
                return job
            self._end(job, "aborted")
        return None

    def _perform(self, job: Job) -> None:
        ok = self._guard(lambda: self._dispatch(job), job.generation, job)
        self._end(job, "done" if ok else "aborted")

    def _dispatch(self, job: Job) -> None:
        if isinstance(job, StepJob):
            self._step(job)
        elif isinstance(job, ConfirmJob):
            self._confirm(job)
        elif isinstance(job, ResyncJob):
            self._resync(job)

    def _guard(self, action: Callable[[], None], generation: int, job: Job | None = None) -> bool:
        """Run something that a fault may end; what it had under way is abandoned then."""
        try:
            action()
            return True
        except Interrupted:
            pass
        except ProtocolError as error:
            if job is None:
                self.agent.failed(generation, str(error))
            else:
                job.error = error
        except GroupError as error:
            logger.debug("collective of generation %d failed: %s", generation, error)
            self.agent.failed(generation, str(error).splitlines()[0][:200])
        self._broken = max(self._broken, generation)
        self._leave_group()
        return False

    def _end(self, job: Job, outcome: str) -> None:
        with self.agent.condition:
            job.outcome = outcome
            self.agent.condition.notify_all()

    def _abort_jobs(self, before: int) -> None:
        for job in self._jobs.copy():  # In one go: another thread appends.
            if job.generation < before:
                self._jobs.remove(job)
                self._end(job, "aborted")

    # ---------------------------------------------------------------- generations

    def _leave_group(self) -> None:
        group, self._group, self._rounds = self._group, None, None
        self.patience.poll_s = None
        if group is not None:
            group.leave()

    def _enter(self, record: Record) -> None:
        rank = record.rank_of(self.agent.uid)
        if rank is None:
            return
        group = before = self._group
        if group is None or group.key != record.group:
            self._leave_group()
            group = self._group = self._build(record, rank)
            self.patience.poll_s = group.poll_s
        self._collect_traffic()
        self.paths.forget(new_group=group is not before)
        make = functools.partial(Exchange, record, rank, self.layout, group, self.codec_states, self.fidelity)
        self._rounds = Rounds(Exchanges(record, make), self.layout, self.agent, self.patience)
        replayed = self._replay(record, rank) if record.behind else None
        if self.agent.uid in record.unhealed and self.followed_to != record.cursor:
            # What was followed so far does not lead here: healing starts again from a new snapshot.
            with self.agent.condition:
                self.followed.clear()
                self.followed_to = record.cursor
                self.follow_starts += 1
        with self.agent.condition:
            self.entered, self.replayed = record, replayed
            self.agent.condition.notify_all()

    def _wire_device(self, record: Record) -> torch.device:
        return torch.device(self.agent.member.device if record.backend == "nccl" else "cpu")

    def _build(self, record: Record, rank: int) -> Group:
        builder = GroupBuilder(
            record.group,
            self._meetings.meeting(record.group),
            rank,
            len(record.members),
            self.agent.member.host,
            self._wire_device(record),
            self._poller.wake,
        )
        try:
            self.patience.until(lambda: builder.done, record.number, record.base, peers=True)
        except Interrupted:
            builder.abandon()
            raise
        if builder.error is not None or builder.group is None:
            raise GroupError(f"no group for generation {record.number}: {builder.error}")
        builder.group.join(self._poller)
        return builder.group

    def _replay(self, record: Record, rank: int) -> tuple[Sums, list[torch.Tensor]] | None:
        """Whoever holds the base step sends its decoded sums to those that are one step behind."""
        assert self._group is not None and record.source is not None
        source = record.rank_of(record.source)
        receivers = [r for r in (record.rank_of(uid) for uid in record.behind) if r is not None]
        assert source is not None
        data = torch.zeros(replay.packed_bytes(self.layout) if rank in receivers else 0, dtype=torch.uint8)
        if rank == source:
            step, packed = self._kept
            assert step == record.base, f"the source keeps step {step}, and not the base {record.base}"
            data = packed()
        one_to_all(
            self._group, source, receivers, data, lambda op: self.patience.finish(op, record.number, record.base)
        )
        if rank not in receivers:
            return None
        # It may be the source of the next generation, when others have yet to take the step over.
        self._kept = (record.base, lambda: data)
        outs = [torch.empty(b.numel, dtype=b.dtype) for b in self.layout.buckets]
        return replay.unpack(data, self.layout, record.base, outs), outs

    # ---------------------------------------------------------------- jobs

    def _step(self, job: StepJob) -> None:
        rounds = self._rounds
        assert rounds is not None
        sums, exchange = rounds.step(job), rounds.exchange
        self._kept = (job.step, lambda: replay.pack(sums, exchange, self.layout))
        self._collect_traffic()
        self.paths.look(exchange)
        points.reach("decoded", job.step)
        job.sums = sums

    def _confirm(self, job: ConfirmJob) -> None:
        assert self._rounds is not None
        self._rounds.confirm(job)

    def _resync(self, job: ResyncJob) -> None:
        assert self._rounds is not None
        self._rounds.resync(job, self._resync_bytes)
        self._collect_traffic()

    # ---------------------------------------------------------------- while not healed

    def _follow(self, record: Record) -> None:
        """Take part in the next step with a header only, and keep its sums for the replay."""
        assert self.followed_to is not None
        number, step = record.number, self.followed_to.step + 1
        epoch = self.followed_to.epoch
        job = StepJob(number, step, outs=self._outs, ready=len(self.layout.buckets), epoch=epoch)
        if not self._guard(lambda: self._step(job), number):
            return
        sums = job.sums
        assert sums is not None
        after, at_epoch_end = self._advance(self.followed_to)
        with self.agent.committing(number) as allowed:
            if not allowed:
                return
            with self.agent.condition:
                self.followed.append((sums, [out.clone() for out in self._outs], after))
                self.followed_to = after
                self.agent.advance(after)
                self.agent.condition.notify_all()
        want = sums.want
        if (
            want <= number
            and self._resync_due(record, step)
            and sums.replicas_differ
            and not self._guard(lambda: self._resync(ResyncJob(number, step)), number)
        ):
            return
        if want <= number and at_epoch_end:
            confirm = ConfirmJob(number, step)
            if not self._guard(lambda: self._confirm(confirm), number):
                return
            want = confirm.want
        if want > number:
            self.agent.answer_want(want)

    def _collect_traffic(self) -> None:
        if self._rounds is not None:
            self.traffic.take(self._rounds.exchange.traffic)
