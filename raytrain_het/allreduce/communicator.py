"""The communication thread: one launch order on all members, overlapped with the backward pass.

It enters generations (makes the group, sends the kept step to whoever is one step behind), runs the jobs that the
training thread submits, and follows along by itself while this member is not healed. The training thread never touches
the group. What the two hand each other is in ``jobs.py``; ``followed`` and ``codec_states`` are shared as their
docstrings say.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
from collections.abc import Callable, Sequence

import torch

from raytrain_het.allreduce import kept_step
from raytrain_het.allreduce.collectives import Collectives
from raytrain_het.allreduce.compression_error import CompressionErrorMeter
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.followed import FollowedStep, FollowedSteps
from raytrain_het.allreduce.jobs import (
    ABORTED,
    BytesMoved,
    ConfirmJob,
    ConfirmResult,
    Contribution,
    Entered,
    Job,
    LocalBucket,
    Result,
    ResyncJob,
    SendBuffers,
    StepJob,
    StepResult,
)
from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.path_watch import PathWatch
from raytrain_het.allreduce.reducers import ReducerByEpoch, reducer_for
from raytrain_het.allreduce.step_summary import StepSummary
from raytrain_het.allreduce.transport.building import GroupBuilder
from raytrain_het.allreduce.transport.group import Group, GroupError
from raytrain_het.allreduce.transport.one_to_all import one_to_all
from raytrain_het.allreduce.transport.poller import Poller
from raytrain_het.allreduce.waiting import GenerationIsVoid, Waiter
from raytrain_het.errors import ProtocolError, RunFailedError
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.meeting import MeetingPlace
from raytrain_het.membership.record import Record

logger = logging.getLogger("raytrain_het")


class Communicator:
    """One worker's communication thread, and the training thread's side of it.

    Args:
        agent: the member's side of membership: which record is in force, what is void.
        layout: the buckets.
        advance: the cursor after one more step, and whether an epoch has ended with it.
        resync_due: whether unlike members' parameters are sent anew after a step, if they turn out to differ.
        hang_limit_s: after so long the hub gives up a member.
    """

    def __init__(
        self,
        agent: MemberAgent,
        layout: Layout,
        *,
        advance: Callable[[Cursor], tuple[Cursor, bool]],
        hang_limit_s: float,
        resync_due: Callable[[Record, int], bool] = lambda record, step: False,
    ) -> None:
        self.agent, self.layout = agent, layout
        self.entered: Entered | None = None
        """The generation whose group stands. Replaced by the communication thread, under ``agent.condition``."""
        self.moved = BytesMoved()
        """Replaced by the communication thread."""
        self.followed = FollowedSteps(layout, agent.condition)
        self.codec_states = ErrorFeedback(layout)
        """The communication thread reads and writes it while a step's job is under way. The training thread commits
        between steps, and may copy it at any time."""
        self._resync_due, self._advance = resync_due, advance
        self._scratch = [torch.zeros(b.numel, dtype=b.dtype) for b in layout.buckets]
        """Means of steps that this member only follows."""
        self._poller = Poller()
        self._waiter = Waiter(agent, self._poller, hang_limit_s=hang_limit_s)
        self._paths, self._error_meter = PathWatch(), CompressionErrorMeter()
        self._jobs: collections.deque[Job] = collections.deque()
        self._group: Group | None = None
        self._collectives: Collectives | None = None
        self._kept: tuple[int, Callable[[], torch.Tensor]] = (-1, lambda: torch.zeros(0))
        """The last step that this member has the sums of, and how to pack them for one that has not."""
        self._broken = 0
        """The highest generation in which a collective has failed here."""
        self._meetings = MeetingPlace(agent)
        agent.position = lambda: self._waiter.position
        agent.on_change = self._poller.wake
        self._thread = threading.Thread(target=self._run, name="het-communication", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- the training thread's side

    def submit(self, job: Job) -> None:
        """Queue a job of the generation in force. A job of another one is aborted."""
        self._jobs.append(job)
        self._poller.wake()

    def wake(self) -> None:
        """A submitted job has more full buckets."""
        self._poller.wake()

    def close(self) -> None:
        """Stop the thread, which leaves the group."""
        self._waiter.closed = True
        self._poller.wake()
        self._thread.join(timeout=2)

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        torch.set_num_threads(1)  # Its tensor work is copies and sums; a pool of its own would fight the training's.
        try:
            while not self._waiter.closed:
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
        record, void = self.agent.record, self.agent.void
        entered = self.entered.record if self.entered is not None else None
        newer = record is not None and (entered is None or record.number > entered.number)
        if record is not None and newer and void <= record.number > self._broken:
            self._abort_jobs(before=record.number)
            self._guard(lambda: self._enter(record), record.number)
            return True
        if entered is None:
            return False
        if void > entered.number or self._broken >= entered.number:
            self._leave_group()
        if self._waiter.interrupted(entered.number) or self._broken >= entered.number:
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
            self._end(job, ABORTED)
        return None

    def _perform(self, job: Job) -> None:
        self._end(job, self._guard(lambda: self._result_of(job), job.generation, job) or ABORTED)

    def _result_of(self, job: Job) -> Result:
        match job:
            case StepJob():
                return self._step(job)
            case ConfirmJob():
                return self._confirm(job)
            case ResyncJob():
                return self._resync(job)
        raise TypeError(f"no such job: {job}")

    def _guard(self, action: Callable[[], Result], generation: int, job: Job | None = None) -> Result | None:
        """Run something that a fault may end; what it had under way is abandoned then, and the result is None, or the
        error that the training thread is to raise."""
        result = None
        try:
            return action()
        except GenerationIsVoid:
            pass
        except ProtocolError as error:
            if job is None:
                self.agent.failed(generation, str(error))
            else:
                result = Result(done=False, error=error)
        except GroupError as error:
            logger.debug("collective of generation %d failed: %s", generation, error)
            self.agent.failed(generation, str(error).splitlines()[0][:200])
        self._broken = max(self._broken, generation)
        self._leave_group()
        return result

    def _end(self, job: Job, result: Result) -> None:
        with self.agent.condition:
            job.result = result
            self.agent.condition.notify_all()

    def _abort_jobs(self, before: int) -> None:
        for job in self._jobs.copy():  # In one go: another thread appends.
            if job.generation < before:
                self._jobs.remove(job)
                self._end(job, ABORTED)

    # ---------------------------------------------------------------- generations

    def _leave_group(self) -> None:
        self._count_traffic()
        group, self._group, self._collectives = self._group, None, None
        self._waiter.poll_s = None
        if group is not None:
            group.leave()

    def _enter(self, record: Record) -> Result:
        rank = record.rank_of(self.agent.uid)
        if rank is None:
            return ABORTED
        group = before = self._group
        if group is None or group.key != record.group:
            self._leave_group()
            group = self._group = self._build(record, rank)
            self._waiter.poll_s = group.poll_s
        if record.reset:
            self._waiter.step_s = 0.0
        self._count_traffic()
        self._paths.forget(new_group=group is not before)
        make = functools.partial(reducer_for, record, rank, self.layout, group, self.codec_states, self._error_meter)
        reducers = ReducerByEpoch(record, make)
        self._collectives = Collectives(reducers, self.layout, self.agent, self._waiter)
        replayed = self._replay(record, rank, group) if record.behind else None
        if self.agent.uid in record.unhealed:
            self.followed.start_at(record.cursor)
        entered = Entered(record=record, replayed=replayed, send_buffers=reducers.current.send_buffers)
        with self.agent.condition:
            self.entered = entered
            self.agent.condition.notify_all()
        return Result()

    def _build(self, record: Record, rank: int) -> Group:
        builder = GroupBuilder(
            record.group,
            self._meetings.meeting(record.group),
            rank,
            len(record.members),
            self.agent.member.host,
            torch.device(self.agent.member.device if record.backend == "nccl" else "cpu"),
            self._poller.wake,
        )
        try:
            self._waiter.until(lambda: builder.done, record.number, record.base, peers=True)
        except GenerationIsVoid:
            builder.abandon()
            raise
        if builder.error is not None or builder.group is None:
            raise GroupError(f"no group for generation {record.number}: {builder.error}")
        builder.group.join(self._poller)
        return builder.group

    def _replay(self, record: Record, rank: int, group: Group) -> tuple[StepSummary, Sequence[torch.Tensor]] | None:
        """Whoever holds the base step sends its means to those that are one step behind."""
        source = record.source_rank
        receivers = [r for r in (record.rank_of(uid) for uid in record.behind) if r is not None]
        data = torch.zeros(kept_step.packed_bytes(self.layout) if rank in receivers else 0, dtype=torch.uint8)
        if rank == source:
            step, packed = self._kept
            assert step == record.base, f"the source keeps step {step}, and not the base {record.base}"
            data = packed()
        one_to_all(group, source, receivers, data, lambda op: self._waiter.finish(op, record.number, record.base))
        if rank == source or rank in receivers:
            sent = data.numel() * len(receivers) if rank == source else 0
            self.moved = BytesMoved(self.moved.sent + sent, self.moved.received + (0 if sent else data.numel()))
        if rank not in receivers:
            return None
        # It may be the source of the next generation, when others have yet to take the step over.
        self._kept = (record.base, lambda: data)
        means = [torch.empty(b.numel, dtype=b.dtype) for b in self.layout.buckets]
        return kept_step.unpack(data, self.layout, record.base, means), means

    # ---------------------------------------------------------------- jobs

    def _joined(self) -> Collectives:
        """Those of the generation that was entered: jobs are done in no other."""
        if self._collectives is None:
            raise GenerationIsVoid
        return self._collectives

    def _step(self, job: StepJob) -> StepResult:
        collectives = self._joined()
        self._waiter.step_s = job.step_s or self._waiter.step_s
        summary, waited_s = collectives.all_reduce(job)
        reducer = collectives.reducer
        self._kept = (job.step, lambda: kept_step.pack(summary, reducer, self.layout))
        self._count_traffic()
        self._paths.look(reducer)
        self.agent.points.reach("decoded", job.step)
        return StepResult(
            summary=summary,
            means=(job.contribution or Contribution()).means,
            send_buffers=self._next_send_buffers(job.cursor, collectives),
            waited_s=waited_s,
            paths=self._paths.take(),
            errors=self._error_meter.take(),
        )

    def _next_send_buffers(self, cursor: Cursor, collectives: Collectives) -> SendBuffers | None:
        """Those of the step after this one; None where a codec that warms up has messages of other sizes then."""
        after, _ = self._advance(cursor)
        return collectives.reducer.send_buffers if collectives.reducers.is_unchanged_in(after.epoch) else None

    def _confirm(self, job: ConfirmJob) -> ConfirmResult:
        return ConfirmResult(want=self._joined().confirm(job))

    def _resync(self, job: ResyncJob) -> Result:
        self._joined().resync(job)
        self._count_traffic()
        return Result()

    def _count_traffic(self) -> None:
        if self._collectives is not None:
            new = self._collectives.reducer.traffic
            self.moved = BytesMoved(self.moved.sent + new.sent, self.moved.received + new.received)
            new.sent = new.received = 0

    # ---------------------------------------------------------------- while not healed

    def _follow(self, record: Record) -> None:
        """Take part in the next step with a header only, and keep its means for the replay."""
        cursor, number = self.followed.cursor or record.cursor, record.number
        job = StepJob(number, cursor.step + 1, cursor=cursor)
        job.hand_over(Contribution(means=self._scratch), [LocalBucket()] * len(self.layout.buckets), last=True)
        result = self._guard(lambda: self._step(job), number)
        if not isinstance(result, StepResult):
            return
        summary = result.summary
        after, at_epoch_end = self._advance(cursor)
        with self.agent.committing(number) as allowed:
            if not allowed:
                return
            with self.agent.condition:
                self.agent.advance(after)
                self.followed.append(FollowedStep(summary, [mean.clone() for mean in self._scratch], after))
        want = summary.want
        if want <= number and self._resync_due(record, job.step) and summary.replicas_differ:
            resync = ResyncJob(number, job.step)
            if self._guard(lambda: self._resync(resync), number) is None:
                return
        if want <= number and at_epoch_end:
            confirmed = self._guard(lambda: self._confirm(ConfirmJob(number, job.step)), number)
            if not isinstance(confirmed, ConfirmResult):
                return
            want = confirmed.want
        if want > number:
            self.agent.answer_want(want)
