"""One step, from the training thread's side: opened by the loader, closed by the optimizer, done again if it fails.

Order of a step: :meth:`Engine.open` (the record in force gives the slice) -> for each micro-batch :meth:`Engine.arm`,
the user's forward and backward pass -> at the end of the last backward pass the sums are waited for ->
:meth:`Engine.close` updates and commits. A step whose generation was voided is closed without an update and opened
again under the next record.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from raytrain_het.allreduce import points
from raytrain_het.allreduce.communicator import Communicator
from raytrain_het.allreduce.jobs import (
    ConfirmJob,
    ConfirmResult,
    Contribution,
    LocalBucket,
    Result,
    ResyncJob,
    SendBuffers,
    StepJob,
    StepResult,
)
from raytrain_het.allreduce.sums import Sums
from raytrain_het.config import HetConfig
from raytrain_het.errors import LoopOrderError, NonFiniteGradientError, ReplicaMismatchError
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.protocol import Audit, Claim, Event, ReplicaAudit
from raytrain_het.membership.record import Record
from raytrain_het.worker.checks.body_watch import BodyWatch
from raytrain_het.worker.checks.hand_edits import HandEdits
from raytrain_het.worker.checks.losses import LossCheck, Root
from raytrain_het.worker.checks.rehearsal import Rehearsal
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.data.data_plan import DataPlan, micro_batches, slice_of
from raytrain_het.worker.state.healing import Healing
from raytrain_het.worker.state.randomness import Randomness
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.state.replica_check import Look, ReplicaCheck
from raytrain_het.worker.state.structure import Structure
from raytrain_het.worker.step.gradients import Gradients
from raytrain_het.worker.step.memory import FIRST, MemoryLimit
from raytrain_het.worker.step.rates import Rates
from raytrain_het.worker.step.timings import CpuSplit, Timings

logger = logging.getLogger("raytrain_het")

HUB_S = 10.0
"""So long a worker waits for the hub to end the run."""
EVERY_MODULE_STEPS = 20
"""In a run's first steps no module is passed over when the model's structure is looked at."""


@dataclass
class Opened:
    """A step under way."""

    record: Record
    cursor: Cursor
    batch: range
    own: range
    """This worker's slice of the epoch's permutation; empty with a share of 0."""
    micro: list[range]
    job: StepJob
    started: float
    loss_scale: float = 1.0
    """What this worker's loss is multiplied by."""
    weights: list[float] = field(default_factory=list)
    rehearses: bool = False
    """Whether the first pass is of the whole batch, to compare with."""
    watched: bool = False
    """Whether it is looked at whether samples of the first pass see each other."""
    contributes: bool = False
    """Whether this worker's passes are part of the sums."""
    weight: float = 0.0
    """That of all of them together."""
    sums: Sums | None = None
    settled: bool = False
    """Whether the backward pass is over and it is known what became of the step."""
    closed: bool = False
    submitted: float = 0.0
    cpu: CpuSplit = field(default_factory=CpuSplit)
    inputs: Any = None
    left_at: float | None = None
    """When the loop over its epoch was left after it."""
    away_s: float = 0.0
    """How long the loop was left: for the epoch's confirmation, evaluation, reports."""
    waited_s: float = 0.0
    """How long only peers were waited for."""


@dataclass
class Counters:
    """What this worker has done since it started. Seconds, bytes, samples."""

    samples: int = 0
    steps: int = 0
    skipped: int = 0
    redone: int = 0
    uncounted: int = 0
    """Times that the loop's body ran on samples that do not count: stand-ins, a step that was done again, a whole batch
    to compare with."""
    clipped: int = 0
    """Updates before which gradients were clipped, those replayed included."""
    compute_s: float = 0.0
    wait_s: float = 0.0


class Engine:
    """Drives the steps of one worker. Used by the training thread only."""

    def __init__(
        self,
        *,
        agent: MemberAgent,
        communicator: Communicator,
        replica: Replica,
        gradients: Gradients,
        plan: DataPlan,
        config: HetConfig,
        healing: Healing,
        micro_batch_size: int | None,
        memory: MemoryLimit,
        structure: Structure,
        randomness: Randomness,
        loss: LossCheck,
        check: ReplicaCheck,
        rehearsal: Rehearsal | None = None,
        rates: Rates | None = None,
    ) -> None:
        self.agent, self.comm, self.replica, self.gradients = agent, communicator, replica, gradients
        self.plan, self.config, self.healing = plan, config, healing
        self.counters = Counters()
        self.timings = Timings(agent, plan.full_batch)
        self.opened: Opened | None = None
        self.confirmed = 0
        """Steps up to this one are committed on every member."""
        self.on_commit: list[Callable[[Opened, Sums], None]] = []
        self.on_confirm: list[Callable[[int], None]] = []
        self._micro_batch_size, self._memory, self._rates = micro_batch_size, memory, rates
        self._structure, self._randomness, self._loss = structure, randomness, loss
        self._check, self._rehearsal = check, rehearsal
        self._edits = HandEdits([p for _, p in replica.named_parameters()])
        self._body = BodyWatch()
        self._looked: Look | None = None
        self._pass_weight = 0.0
        gradients.inspect, gradients.inspect_fired = self._inspect, loss.fired
        self._light: dict[str, Any] | None = None
        self._redo = False
        self._confirm: ConfirmJob | None = None
        self._skipped_in_a_row = 0
        self._record: Record | None = None
        self._send_buffers: SendBuffers | None = None
        self.step_s = 0.0
        """How long a step usually takes; 0 before the first one."""
        agent.batch = self._open_batch

    @property
    def cursor(self) -> Cursor:
        """Position after the last committed step."""
        return self.agent.cursor

    @property
    def open_body(self) -> Opened | None:
        """The step whose body runs, until it is committed: it may be done again."""
        return self.opened if self.opened is not None and not self.opened.closed else None

    def doing(self, waits: bool) -> str:
        """Where the training thread is, in words."""
        opened, step = self.opened, self.agent.cursor.step
        if opened is None:
            return "waiting for the others before its first step" if waits else "before its first step"
        if opened.closed:
            return f"after step {step}, " + ("waiting for the others" if waits else "in the function's own code")
        if opened.settled:
            return f"in step {opened.job.step}, after backward()"
        if opened.submitted:
            return f"in step {opened.job.step}, waiting for the others' gradients"
        num = len(opened.micro)
        part = f", pass {max(1, len(opened.weights))} of {num}" if num > 1 else ""
        return f"computing step {opened.job.step}{part}"

    # ---------------------------------------------------------------- opening

    def start(self) -> None:
        """Wait for the first generation and take over its state."""
        self._enter()

    def open(self, epoch: int) -> Opened | None:
        """Open the next step; None at the end of the epoch, confirmed by all."""
        self._settle_last()
        before = self.opened if self.opened is not None and self.opened.sums is not None else None
        asked = time.monotonic()
        if before is not None:
            self._loop_goes_on(before, asked)
        while True:
            self._wait_for_confirmation()
            record = self._enter()
            if self.cursor.epoch != epoch:
                if self._confirm is None and self.agent.is_current(record.number):
                    if before is not None:
                        before.left_at = asked
                        before.cpu.pauses()
                    self._randomness.steps_end()
                    return None
                continue
            points.reach("slice", self.cursor.step + 1)
            if self.agent.is_current(record.number):
                break
        cursor = self.cursor
        self._structure.check(cursor.step, everything=cursor.offset == 0 or cursor.step < EVERY_MODULE_STEPS)
        self._take_back_the_beginning()
        if self._redo and not self._edits.take_back():
            raise refuse("weights changed in a failed step", f"it was step {cursor.step + 1}")
        light = self._light if self._redo else None
        if light is not None:
            self.replica.restore_light(light)
            self.counters.redone += 1
            self.counters.uncounted += 1
        if self._rates is not None:
            assert self.replica.optimizer is not None
            self._rates.set(self.replica.optimizer, cursor)
        self._light = light or self.replica.light()
        self._redo = False
        self.healing.offer(record, cursor, self._light, self._parameters_digest, self._randomness.state())
        self._randomness.step_begins(cursor.step)
        self._memory.step_begins()
        opened = self._slice(record, cursor)
        # An epoch's last batch may be a small one: speeds are told of full ones.
        if (
            before is not None
            and before.record is record
            and len(before.batch) == self.plan.full_batch
            and not before.rehearses
            and not before.watched
        ):
            cycle_s, waited_s = opened.started - before.started - before.away_s, before.waited_s
            waited_s -= before.cpu.own_part_s(waited_s, cycle_s)
            self.timings.step_done(sum(map(len, before.micro)), waited_s, cycle_s, stand_in=not before.own)
        self.opened = opened
        self.comm.submit(opened.job)
        points.reach("opened", opened.job.step)
        return opened

    def _take_back_the_beginning(self) -> None:
        """A worker that has come in the middle of an epoch: what its program has just done at the epoch's beginning (a
        scheduler's step, draws) was done before."""
        light, self.healing.arrived = self.healing.arrived, None
        if light is not None:
            self.replica.restore_light(light, buffers="buffers" in light)
            self._randomness.load(light["random"])

    def buffers_when_opened(self) -> dict[str, torch.Tensor]:
        """In the middle of a step: its buffers when it was opened, and not what this worker's pass has made of
        them; nothing between steps."""
        opened, light = self.opened, self._light
        in_the_middle = opened is not None and not opened.closed and not opened.settled
        return light["buffers"] if in_the_middle and light is not None else {}

    def _loop_goes_on(self, before: Opened, now: float) -> None:
        """The loop asks for what comes after a step that is done; at an epoch's end it does so twice."""
        if before.left_at is not None:
            before.away_s += now - before.left_at
            before.cpu.goes_on()
            before.left_at = None
        elif before.own:
            self._memory.passed(max(map(len, before.micro)))

    def _slice(self, record: Record, cursor: Cursor) -> Opened:
        rank = record.rank_of(self.agent.uid)
        assert rank is not None
        batch = self.plan.batch_at(cursor)
        own = slice_of(batch, record.shares, rank)
        # A share of 0 still runs the loop's body, so that user code behaves alike; the gradient is dropped.
        micro = self._passes(own) if len(own) else [self._stand_in(batch, cursor.epoch)]
        step = cursor.step + 1
        job = StepJob(
            record.number,
            step,
            cursor=cursor,
            num_samples=len(batch),
            step_s=self.step_s,
        )
        assert self._light is not None
        self._looked = self._check.look(step, self._light, self._numbers_besides(cursor))
        rehearses = self._rehearsal is not None and self._rehearsal.is_due(record, rank, cursor.step)
        if rehearses:
            micro = [batch, *micro]
        opened = Opened(
            record,
            cursor,
            batch,
            own,
            micro,
            job,
            time.monotonic(),
            self.replica.loss_scale,
            rehearses=rehearses,
            contributes=len(own) > 0,
        )
        # A program may begin something else at an epoch; so in the first step of epochs 0, 1, 2, 4, 8 ...
        at_beginning = self.counters.steps == 0 or cursor.offset == 0 and cursor.epoch & (cursor.epoch - 1) == 0
        opened.watched = at_beginning and len(own) > 0 and not self._loss.is_local and not self._is_alone(opened)
        self._edits.step_begins(len(micro))
        self._loss.begin_step()
        self.gradients.begin(
            job,
            # What an earlier codec has left out is added to a bucket of its own.
            send_buffers=None if self.comm.codec_states.has_earlier_residual else self._send_buffers,
            on_full=lambda buckets: self._hand_over(opened, buckets),
            on_backward_done=lambda last: self._backward_done(opened, last),
        )
        return opened

    def _stand_in(self, batch: range, epoch: int) -> range:
        """Two samples, since a batch norm of one raises."""
        size = self.plan.epoch_size(epoch)
        start = max(0, min(batch.start, size - 2))
        return range(start, min(start + 2, size))

    def _passes(self, samples: range) -> list[range]:
        """Cut what one forward pass can't hold, by what the user allows, and by what fits into memory."""
        allowed, fits = self._micro_batch_size, self._memory.samples
        if fits is None or allowed is not None and allowed <= fits:
            return micro_batches(samples, allowed)
        return micro_batches(samples, fits, least=FIRST)

    def _cut_rest_anew(self, opened: Opened) -> None:
        """Passes grow within a step too, as soon as it is known that larger ones fit."""
        done = len(opened.weights)
        if opened.own and done < len(opened.micro) and self._memory.samples is not None:
            self._memory.passed(max(map(len, opened.micro[:done])))
            opened.micro[done:] = self._passes(range(opened.micro[done].start, opened.own.stop))

    def _numbers_besides(self, cursor: Cursor) -> dict[str, Any]:
        """What else must be the same on all members in this step."""
        return {
            "the position in the data (epoch, offset, step)": str(list(cursor.to_dict().values())),
            "the order of the epoch's samples": self.plan.order_digest(cursor.epoch),
        }

    def _parameters_digest(self) -> int:
        return self.replica.digest(optimizer=True)

    def _enter(self) -> Record:
        """The record in force, once its group stands and this worker holds its base."""
        agent, comm = self.agent, self.comm
        while True:
            # Who is only on its way in is in no collective either: the one member that it waits for may have stopped.
            agent.wait_for_peers(lambda: comm.entered is not None and agent.is_current(comm.entered.record.number))
            entered = comm.entered
            assert entered is not None
            record = entered.record
            if record is self._record:
                return record
            if not self.healing.take_over(record):
                continue  # The generation was superseded while this worker was healing.
            self._record, self._send_buffers = record, entered.send_buffers
            self._check.restart()
            if record.reset or self.agent.uid in record.fresh:
                self._redo = False  # What a step to be done again would go back to is no longer its beginning.
            if record.reset and record.checkpoint is not None and self.cursor.offset > 0:
                light = self.replica.light()
                settings = {name: light[name] for name in ("registered", "hyperparameters")}
                self.healing.arrived = settings | {"random": self._randomness.state()}
            if record.reset:
                self.step_s = 0.0
            self._confirm_up_to(record.base)
            return record

    def _open_batch(self) -> list[int] | None:
        opened = self.opened
        if opened is None or opened.closed:
            return None
        return [opened.cursor.epoch, opened.batch.start, len(opened.batch)]

    # ---------------------------------------------------------------- the body of the loop

    def arm(self, index: int, weight: float, inputs: Any, weigh: Callable[[Any], float] | None = None) -> None:
        """The next backward pass belongs to this micro-batch. ``weigh`` gives the weights of others like it."""
        opened = self._current()
        self._arm(opened, index, weight, inputs)
        if index == 0 and opened.watched:
            self._body.begin(inputs, len(opened.micro[0]), weigh)

    def _arm(self, opened: Opened, index: int, weight: float, inputs: Any) -> None:
        if index > 0:
            # The loop's body runs once for each micro-batch: what it does to schedules counts once.
            assert self._light is not None
            self.replica.restore_light(self._light, buffers=False)
            self._edits.take_back()
        rehearsal = opened.rehearses and index == 0
        counts = opened.contributes and not rehearsal
        opened.weights.append(self._scaled(opened, index, weight) if counts else 0.0)
        opened.inputs = inputs
        if rehearsal:
            self._pass_weight = weight
            self.gradients.rehearse()
            return
        last = index == len(opened.micro) - 1
        if last:
            opened.weight = float(sum(opened.weights))
            opened.contributes = opened.weight > 0
        of_gradient = opened.weights[-1]
        if self._loss.is_sum and opened.contributes:
            of_gradient = self._lr_scale(opened)
        self._pass_weight = weight
        # What travels is not scaled: it is in fp32, and other workers may have another scale, or none.
        self.gradients.arm(
            of_gradient / opened.loss_scale,
            of_buffers=opened.weights[-1],
            contributes=opened.contributes,
            last=last,
        )

    def _scaled(self, opened: Opened, index: int, weight: float) -> float:
        """``w_i = b_i r_i``, or this micro-batch's part of it; of ``r_i`` where sums are literal.

        Of a loss that is a sum over samples, gradients are added up as they are, times ``r_i``; the weights' sum, by
        which they are divided, is ``sum_i b_i r_i / B``.
        """
        samples = len(opened.micro[index])
        part = weight if opened.record.normalised else samples / len(opened.own)
        if self._loss.is_sum and opened.record.normalised:
            part = samples / len(opened.batch)
        return part * self._lr_scale(opened)

    def _lr_scale(self, opened: Opened) -> float:
        rank = opened.record.rank_of(self.agent.uid)
        assert rank is not None
        return opened.record.lr_scales[rank]

    def _inspect(self, roots: Sequence[Root]) -> Exception | None:
        """Is the loss what the program says? With one pass a step by one worker it does not matter."""
        opened = self._current()
        if self._is_alone(opened):
            return None
        samples = len(opened.micro[len(opened.weights) - 1])
        record, passes = opened.record, opened.micro[opened.rehearses :]
        sizes = {len(slice_of(opened.batch, record.shares, rank)) for rank in range(len(record.members))} - {0}
        alike = len(sizes) == 1 and len({len(part) for part in passes}) == 1
        error = self._loss.look(roots, self._pass_weight, opened.loss_scale, samples=samples, alike=alike)
        if error is None and (how := self._body.met(roots)) is not None:
            error = refuse("samples that see each other", f"they meet in {how}")
        return error

    @staticmethod
    def _is_alone(opened: Opened) -> bool:
        return len(opened.record.members) == 1 and len(opened.micro) == 1

    def body_over(self) -> None:
        """The loop's body is over, or was left: nothing of it is followed any more."""
        self._body.end()

    def body_done(self) -> None:
        """The user's loop body has come to its end and asks for the next batch."""
        opened = self._current()
        ran = self.gradients.backward_ran
        self.gradients.disarm()
        if not ran:
            raise LoopOrderError(
                f"the loop asked for the next batch at step {opened.job.step} without backward(): every batch of the "
                "prepared loader needs one backward() and one optimizer.step(). To skip samples, filter the dataset; "
                "to evaluate, use raytrain_het.evaluate()."
            )
        self._cut_rest_anew(opened)

    @property
    def in_body(self) -> bool:
        """Whether a step is open, and its optimizer has not taken it yet."""
        return self.opened is not None and not self.opened.closed

    @property
    def stale(self) -> bool:
        """Whether the open step is over already, so that its remaining micro-batches need not run."""
        return self.opened is not None and self.opened.job.aborted

    def _hand_over(self, opened: Opened, buckets: Sequence[LocalBucket]) -> None:
        """Buckets are full: from here on the communication thread has them."""
        contribution = opened.job.contribution or self._contribution(opened)
        self.comm.hand_over(opened.job, contribution, buckets)
        if len(opened.job.buckets) == len(self.gradients.layout.buckets):
            opened.submitted = time.monotonic()

    def _contribution(self, opened: Opened) -> Contribution:
        looked = self._looked
        return Contribution(
            means=self.gradients.means,
            weight=opened.weight,
            contributes=opened.contributes,
            digest=looked.digest() if looked is not None else 0,  # Not before: a GPU may have been at it.
            numbers=looked.numbers if looked is not None else 0,
            loss=self._loss.mark,
        )

    def _backward_done(self, opened: Opened, last: bool) -> None:
        """Comes out of the user's ``backward()``, and so does what is raised here."""
        if not last:
            return
        if not opened.submitted:
            opened.submitted = time.monotonic()
        points.reach("arrived", opened.job.step)
        opened.cpu.waiting_begins()
        self._await_sums(opened)
        opened.cpu.waiting_ends()
        opened.settled = True
        sums = opened.sums
        if sums is None:
            self._edits.step_fails()
        if sums is not None and sums.losses_differ:
            self._end_for_unlike_losses(opened.cursor.step)
        # Unlike members' digests always differ: they tell samples now and then.
        due = not opened.record.is_unlike or opened.cursor.step < 3 or opened.cursor.step % 10 == 0
        if sums is not None and sums.replicas_differ and self._looked is not None and due:
            look = self._looked
            self.agent.tell(
                Audit(
                    step=opened.cursor.step,
                    part=look.part,
                    generation=opened.job.generation,
                    audit=ReplicaAudit(**self._check.audit(look)),
                )
            )
        if sums is not None:
            self.gradients.buffers.settle(self.gradients.means, sums.applies, own=opened.contributes)
        if opened.rehearses and sums is not None and sums.applies and self._rehearsal is not None:
            means = self.gradients.mean_gradients(scale=opened.loss_scale)
            event = self._rehearsal.compare(opened.cursor.step, means, self.gradients.reference, opened.record)
            buffers = self.gradients.buffers.values()
            self._rehearsal.compare_buffers(
                opened.cursor.step, buffers, self.gradients.buffers_of_reference, opened.record
            )
            self.agent.tell(Event(event=event))
        self.gradients.publish(sums, scale=opened.loss_scale)
        now = time.monotonic()
        self.counters.compute_s += opened.submitted - opened.started
        self.counters.wait_s += now - opened.submitted

    def _end_for_unlike_losses(self, step: int) -> None:
        """Workers' losses are means over other things. No update is made of that: the hub is told of each worker's, and
        ends the run with both; without a hub, this worker says its own."""
        name = "over how many numbers the loss is a mean (in all, and for each sample)"
        self.agent.tell(Claim(step=step, name=name, value=self._loss.terms))
        self.agent.wait_for(lambda: False, timeout=HUB_S)
        raise ReplicaMismatchError(
            f"step {step + 1}: {name} is {self._loss.terms} here, and something else on another worker. Say what the "
            "loss is: prepare_data_loader(loss=..., weight=...)."
        )

    def _await_sums(self, opened: Opened) -> None:
        """Wait until the step has its sums (perhaps from a peer that had them), or is to be done again."""
        self.agent.wait_for(lambda: opened.job.over)
        result = opened.job.result
        if result is not None and result.error is not None:
            raise result.error
        if isinstance(result, StepResult):
            opened.sums, opened.waited_s, self._send_buffers = result.sums, result.waited_s, result.send_buffers
            self.timings.saw(result.paths, result.errors)
        else:
            self._resolve(opened)

    def _resolve(self, opened: Opened) -> None:
        """The generation is void: see from the next one what became of the step."""
        number, comm = opened.job.generation, self.comm
        self.agent.wait_for(
            lambda: (
                comm.entered is not None
                and comm.entered.record.number > number
                and self.agent.is_current(comm.entered.record.number)
            )
        )
        entered = comm.entered
        assert entered is not None
        had, opened.sums = opened.sums, None
        if entered.replayed is not None and entered.record.base == entered.replayed[0].step == opened.job.step:
            opened.sums, means = entered.replayed
            opened.job = StepJob(entered.record.number, opened.job.step, Result(), cursor=opened.cursor)
            if had is None:
                self.gradients.adopt(means)
            # Else they are the same to the bit, and what the user did to them since (clipping) stays.

    # ---------------------------------------------------------------- closing

    def close(self, update: Callable[[], Any]) -> Any:
        """The user's ``optimizer.step()``: update and commit, or nothing if the step is not whole or is done again."""
        self._body.end()
        opened = self.opened
        if opened is None or opened.closed:
            raise LoopOrderError(
                "optimizer.step() was called without a batch of the prepared loader: the order is "
                "for x, y in loader: zero_grad(), backward(), step(), once each."
            )
        if not opened.settled:
            if not self.gradients.backward_ran:
                raise LoopOrderError(
                    "optimizer.step() was called before backward() has computed a gradient of the prepared model "
                    "for this batch: swap the two lines. Gradients that torch.autograd.grad() returns, or that are "
                    "set by hand, are not averaged over workers: use loss.backward()."
                )
            return None  # A micro-batch that is not the last.
        result = None
        while opened.sums is not None and not opened.closed:
            with self.agent.committing(opened.job.generation) as allowed:
                if allowed:
                    result = self._commit(opened, opened.sums, update)
                    opened.closed = True
            if not opened.closed:
                self._resolve(opened)
        if opened.closed:
            self._after_commit(opened)
        else:
            self._edits.step_fails()
            opened.closed = True
            self._redo = True
        return result

    def _commit(self, opened: Opened, sums: Sums, update: Callable[[], Any]) -> Any:
        result = None
        if sums.applies:
            self.healing.log(opened.job.step, self.replica.hyperparameters)
            result = update()
            self.comm.codec_states.commit(opened.job.step, sums.total_weight, sums.used)
        else:
            self.healing.log(opened.job.step, lambda: None)
        points.reach("updated", opened.job.step)
        after, _ = advance(self.plan, opened.cursor)
        self.agent.advance(after, healed=True)
        return result

    def _after_commit(self, opened: Opened) -> None:
        sums, number, step = opened.sums, opened.job.generation, opened.job.step
        assert sums is not None
        self._confirm_up_to(step - 1)
        counters = self.counters
        counters.steps += 1
        counters.samples += len(opened.own)
        counters.uncounted += (not opened.own) + opened.rehearses
        step_s = time.monotonic() - opened.started
        self.step_s = step_s if self.step_s == 0 else 0.8 * self.step_s + 0.2 * step_s
        for listener in self.on_commit:
            listener(opened, sums)
        self._note_skips(opened, sums)
        if sums.want > number:
            self.agent.answer_want(sums.want)
        elif opened.record.number == number:
            if resync_due(self.config.replica_check_steps, opened.record, step) and sums.replicas_differ:
                self._resync(number, step)
            if self.cursor.epoch != opened.cursor.epoch:
                self._confirm = ConfirmJob(number, step)
                self.comm.submit(self._confirm)

    def _resync(self, number: int, step: int) -> None:
        """The replicas differ, as they do on unlike devices: take the first healed member's parameters."""
        record = self._record
        assert record is not None
        first = next(m.uid for m in record.members if m.uid not in record.unhealed)
        job = ResyncJob(number, step)
        if first == self.agent.uid:
            job.data = self.replica.pack_parameters()
        else:
            job.data = torch.zeros(self.replica.parameter_bytes(), dtype=torch.uint8)
        self.comm.submit(job)
        self.agent.wait_for(lambda: job.over)
        if not job.aborted:
            self._check.replicas_are_the_same()
        if not job.aborted and first != self.agent.uid:
            drift = self.replica.unpack_parameters(job.data)
            self.agent.tell(Event(event={"kind": "drift", "step": step, "largest_difference": drift}))

    def _wait_for_confirmation(self) -> None:
        """Until all have committed the epoch's last step: by the round, or by the next generation's base."""
        confirm = self._confirm
        if confirm is None:
            return
        self.agent.wait_for(lambda: confirm.over)
        if confirm.result is not None and confirm.result.error is not None:
            raise confirm.result.error
        if isinstance(confirm.result, ConfirmResult):
            self._confirm_up_to(confirm.step)
            if confirm.result.want > confirm.generation:
                self.agent.answer_want(confirm.result.want)
        self._confirm = None

    def _confirm_up_to(self, step: int) -> None:
        if step > self.confirmed:
            self.confirmed = step
            for listener in self.on_confirm:
                listener(step)

    # ---------------------------------------------------------------- errors and odd ends

    def _settle_last(self) -> None:
        """The loop has asked for another batch: was the last one dealt with?"""
        opened = self.opened
        if opened is None or opened.closed:
            return
        if self.gradients.backward_failed:
            raise refuse("skipped batch", f"at step {opened.job.step}")
        if opened.job.aborted and not opened.settled:
            opened.closed = self._redo = True  # Given up in the middle of its micro-batches.
        elif opened.settled and opened.sums is not None and not opened.sums.applies:
            self.close(lambda: None)  # A loss scaler skips step() itself when gradients overflow.
        elif opened.settled and opened.sums is None:
            opened.closed = self._redo = True
        else:
            raise LoopOrderError(
                f"the loop asked for the next batch at step {opened.job.step} without optimizer.step(): every batch "
                "needs one backward() and one step(). To accumulate gradients, give prepare_data_loader a "
                "micro_batch_size; to skip an update, set p.grad = None for all parameters and call step()."
            )

    def abandon(self) -> None:
        """The function has returned: a step that it has opened and not committed is not this worker's any more."""
        self._body.end()
        if self.gradients.refused is not None:
            raise self.gradients.refused
        opened = self.opened
        if opened is not None and opened.settled and opened.sums is not None and not opened.sums.applies:
            self._settle_last()
        elif opened is not None:
            opened.closed = True

    def _current(self) -> Opened:
        assert self.opened is not None
        return self.opened

    def _note_skips(self, opened: Opened, sums: Sums) -> None:
        if sums.applies:
            self._skipped_in_a_row = 0
            return
        self.counters.skipped += 1
        self._skipped_in_a_row += 1
        names: list[str] = []
        slot = self.agent.member.slot
        text = f"workers {sums.nonfinite_slots}" if sums.nonfinite_slots else "a peer"
        if sums.finite:
            text = "the weights of the whole batch are 0, see prepare_data_loader(weight=)"
            logger.warning("step %d: %s; the update is skipped", opened.job.step, text)
        if slot in sums.nonfinite_slots:
            names = self.gradients.nonfinite_parameters()
            text = f"worker {slot}, parameters {names[:3]}{self._bad_samples(opened)}"
            logger.warning("step %d: gradient not finite on %s; the update is skipped", opened.job.step, text)
            event = {"kind": "skipped", "step": opened.job.step, "parameters": names[:10]}
            self.agent.tell(Event(event=event))
        limit = self.config.max_skipped_steps
        if limit and self._skipped_in_a_row >= limit:
            raise NonFiniteGradientError(
                f"{limit} updates in a row were skipped for want of finite gradients, the last at step "
                f"{opened.job.step} ({text}). Lower the learning rate, look for NaNs in the data, or raise "
                f"HetConfig(max_skipped_steps={limit})."
            )

    def _bad_samples(self, opened: Opened) -> str:
        tensors = opened.inputs if isinstance(opened.inputs, list | tuple) else [opened.inputs]
        indices = opened.micro[-1]
        order = self.plan.permutation(opened.cursor.epoch)
        for t in tensors:
            if isinstance(t, torch.Tensor) and t.is_floating_point() and t.shape[:1] == (len(indices),):
                bad = (~torch.isfinite(t.reshape(len(t), -1))).any(dim=1).nonzero().flatten().tolist()
                if bad:
                    return f" (the data is not finite: samples {[int(order[indices[k]]) for k in bad[:5]]})"
        return ""


def resync_due(every: int, record: Record, step: int) -> bool:
    """Whether unlike members' parameters are sent anew after this step."""
    return every > 0 and step % every == 0 and record.is_unlike


def advance(plan: DataPlan, cursor: Cursor) -> tuple[Cursor, bool]:
    """The cursor after one more committed step, rolled over into the next epoch at an epoch's end, and whether it
    did."""
    after = plan.advance(cursor)
    if plan.is_epoch_end(after):
        return plan.next_epoch(after), True
    return after, False
