"""One step, in the order of its parts: opened by the loader, closed by the optimizer, done again if it fails.

1. *Open* (:meth:`Engine.open`): the generation in force (:mod:`.generations`) gives this worker's slice of the batch,
   which is cut into passes (:mod:`.passes`); what a step that fails goes back to is kept (:mod:`.restore_point`).
2. *Gather* (:meth:`Engine.begin_pass`, the user's forward and backward pass): hooks add each gradient, weighed, to its
   bucket (:mod:`.gradients`).
3. *Reduce* (:mod:`.reducing`): full buckets go to the communication thread; at the end of the last pass the training
   thread waits for the means, which become ``p.grad``.
4. *Update* and 5. *commit* (:meth:`Engine.close`, the user's ``optimizer.step()``; :mod:`.committing`).

A step whose generation was voided is closed without an update and opened again in the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from raytrain_het.allreduce.jobs import StepJob
from raytrain_het.errors import LoopOrderError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.record import Record
from raytrain_het.worker.checks.step_checks import StepChecks
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.step.committing import Committing
from raytrain_het.worker.step.generations import Generations
from raytrain_het.worker.step.gradients import Gradients
from raytrain_het.worker.step.open_step import OpenStep
from raytrain_het.worker.step.passes import Passes
from raytrain_het.worker.step.reducing import Reducing
from raytrain_het.worker.step.restore_point import RestorePoint


class Engine:
    """Drives the steps of one worker. Used by the training thread only.

    Args:
        generations: in which a step is done.
        restore_point: what a step begins from.
        passes: cuts a step's slice.
        gradients: gathered in the passes.
        checks: looks at each step.
        reducing: brings the means.
        committing: makes the update count.
    """

    def __init__(
        self,
        generations: Generations,
        restore_point: RestorePoint,
        passes: Passes,
        gradients: Gradients,
        checks: StepChecks,
        reducing: Reducing,
        committing: Committing,
    ) -> None:
        self.generations, self.committing, self.checks = generations, committing, checks
        self.passes, self.gradients = passes, gradients
        self.agent, self.counters, self.timings = generations.agent, reducing.counters, reducing.timings
        self.opened: OpenStep | None = None
        """The step under way, or the last one."""
        self.has_missed_an_epochs_end = False
        """Whether the loop has left its epoch because this worker, which was away, has healed into a later one. The
        others have done what the program does at an epoch's end."""
        self._restore_point, self._reducing = restore_point, reducing
        gradients.inspect, gradients.inspect_fired = checks.inspect, checks.loss.fired
        reducing.on_failed.append(restore_point.step_failed)
        generations.on_enter.append(self._entered)
        self.agent.batch = self._open_batch

    @property
    def cursor(self) -> Cursor:
        """Position after the last committed step."""
        return self.agent.cursor

    @property
    def replica(self) -> Replica:
        """What the steps update."""
        return self._restore_point.replica

    def end_of(self, epoch: int) -> int:
        """The step with which an epoch has ended that lies behind."""
        plan, cursor = self.passes.plan, self.cursor
        begun = cursor.step - cursor.offset // plan.full_batch
        return begun - (cursor.epoch - epoch - 1) * plan.steps_per_epoch

    # ---------------------------------------------------------------- 1. open

    def start(self) -> None:
        """Wait for the first generation and take over its state."""
        self.generations.enter()

    def open(self, epoch: int) -> OpenStep | None:
        """Open the next step; None at the end of the epoch, confirmed by all."""
        self._settle_last()
        before = self.opened if self.opened is not None and self.opened.summary is not None else None
        asked = time.monotonic()
        if before is not None:
            self._loop_goes_on(before, asked)
        record = self._generation_of_next_step(epoch)
        if record is None:
            if before is not None:
                before.left_at = asked
                before.cpu.pauses()
            self._restore_point.randomness.steps_end()
            self.has_missed_an_epochs_end = self.cursor.epoch > epoch + 1 or self.cursor.offset > 0
            return None
        cursor, self.has_missed_an_epochs_end = self.cursor, False
        self.checks.look_at_model(cursor)
        self._restore_point.take_over(self.generations.healing.take_arrived())
        if self._restore_point.begin(cursor):
            self.counters.redone += 1
            self.counters.uncounted += 1
        self.generations.healing.source.offer(
            record, cursor, self._restore_point.light, self._restore_point.randomness.state()
        )
        self._restore_point.randomness.step_begins(cursor.step)
        self.passes.memory.step_begins()
        self.opened = step = self._new_step(record, cursor)
        if before is not None:
            self._tell_timing(before, step)
        self._reducing.submit(step)
        self.agent.points.reach("opened", step.number)
        return step

    def _generation_of_next_step(self, epoch: int) -> Record | None:
        """The generation in force, whose state this worker holds; None where the epoch is over, confirmed by all."""
        while True:
            self.generations.await_confirmation()
            record = self.generations.enter()
            if self.cursor.epoch != epoch:
                if not self.generations.awaits_confirmation and self.agent.is_current(record.number):
                    return None
                continue
            self.agent.points.reach("slice", self.cursor.step + 1)
            if self.agent.is_current(record.number):
                return record

    def _new_step(self, record: Record, cursor: Cursor) -> OpenStep:
        rank = record.rank_of(self.agent.uid)
        if rank is None:
            raise ValueError(f"{self.agent.uid!r} is no member of generation {record.number}")
        batch, own, micro = self.passes.cut(record, rank, cursor)
        step_s = self.committing.step_s
        step = OpenStep(
            record=record,
            rank=rank,
            cursor=cursor,
            batch=batch,
            own=own,
            micro=micro,
            job=StepJob(record.number, cursor.step + 1, cursor=cursor, num_samples=len(batch), step_s=step_s),
            started=time.monotonic(),
            loss_scale=self._restore_point.replica.loss_scale,
            contributes=len(own) > 0,
        )
        self.checks.begin(step, self._restore_point.light, first=self.counters.steps == 0)
        self._restore_point.begin_passes(len(step.micro))
        self._reducing.begin(step)
        return step

    def _entered(self, record: Record) -> None:
        """A generation begins, and this worker holds its base."""
        self.checks.replica.restart()
        if record.reset or self.agent.uid in record.fresh:
            self._restore_point.forget()
        if record.reset and record.checkpoint is not None and self.cursor.offset > 0:
            self.generations.healing.arrived = self._restore_point.settings()

    def _open_batch(self) -> list[int] | None:
        step = self.open_body
        return None if step is None else [step.cursor.epoch, step.batch.start, len(step.batch)]

    # ---------------------------------------------------------------- 2. gather

    def begin_pass(self, index: int, weight: float, inputs: Any, weigh: Callable[[Any], float] | None = None) -> None:
        """The next backward pass belongs to this one of the step's passes.

        Args:
            index: which one.
            weight: of the pass: its samples, or the user's measure.
            inputs: what the loop's body gets.
            weigh: gives the weights of other inputs like these.
        """
        step = self._current()
        if index > 0:
            self._restore_point.between_passes()
        step.inputs = inputs
        of_gradient, of_buffers = self.passes.weigh(step, index, weight)
        if step.rehearses and index == 0:
            self.gradients.rehearse()
        else:
            last = index == len(step.micro) - 1
            self.gradients.arm(of_gradient, of_buffers=of_buffers, contributes=step.contributes, last=last)
        self.checks.pass_begins(step, index, weight, weigh)

    def end_pass(self) -> None:
        """The user's loop body has come to its end and asks for the next batch."""
        step = self._current()
        ran = self.gradients.backward_ran
        self.gradients.disarm()
        if not ran:
            raise LoopOrderError(
                f"the loop asked for the next batch at step {step.number} without backward(): every batch of the "
                "prepared loader needs one backward() and one optimizer.step(). To skip samples, filter the dataset; "
                "to evaluate, use raytrain_het.evaluate()."
            )
        self.passes.cut_rest_anew(step)

    @property
    def open_body(self) -> OpenStep | None:
        """The step whose body runs, until it is committed: it may be done again."""
        return self.opened if self.opened is not None and not self.opened.closed else None

    @property
    def stale(self) -> bool:
        """Whether the open step is over already, so that its remaining passes need not run."""
        return self.opened is not None and self.opened.job.aborted

    def _current(self) -> OpenStep:
        if self.opened is None:
            raise LoopOrderError("no step is open: take a batch from the prepared loader first.")
        return self.opened

    # ---------------------------------------------------------------- 4. update, 5. commit

    def close(self, update: Callable[[], Any]) -> Any:
        """The user's ``optimizer.step()``: update and commit, or nothing if the step is not whole or is done again."""
        self.checks.body_over()
        step = self.open_body
        if step is None:
            raise LoopOrderError(
                "optimizer.step() was called without a batch of the prepared loader: the order is "
                "for x, y in loader: zero_grad(), backward(), step(), once each."
            )
        if not step.settled:
            if not self.gradients.backward_ran:
                raise LoopOrderError(
                    "optimizer.step() was called before backward() has computed a gradient of the prepared model "
                    "for this batch: swap the two lines. Gradients that torch.autograd.grad() returns, or that are "
                    "set by hand, are not averaged over workers: use loss.backward()."
                )
            return None  # A pass that is not the last.
        while step.summary is not None:
            summary = step.summary
            committed, result = self.committing.commit(step, summary, update)
            if committed:
                self.committing.after_commit(step, summary, self.counters)
                return result
            self._reducing.resolve(step)
        self._restore_point.step_failed()
        self._give_up(step)
        return None

    def _give_up(self, step: OpenStep) -> None:
        """It came to nothing, and is done again."""
        step.closed = True
        self._restore_point.do_again()

    def _settle_last(self) -> None:
        """The loop has asked for another batch: was the last one dealt with?"""
        step = self.open_body
        if step is None:
            return
        if self.gradients.backward_failed:
            raise refuse("skipped batch", f"at step {step.number}")
        if step.job.aborted and not step.settled:
            self._give_up(step)  # In the middle of its passes.
        elif step.settled and step.summary is not None and not step.summary.applies:
            self.close(lambda: None)  # A loss scaler skips step() itself when gradients overflow.
        elif step.settled and step.summary is None:
            self._give_up(step)
        else:
            raise LoopOrderError(
                f"the loop asked for the next batch at step {step.number} without optimizer.step(): every batch "
                "needs one backward() and one step(). To accumulate gradients, give prepare_data_loader a "
                "micro_batch_size; to skip an update, set p.grad = None for all parameters and call step()."
            )

    # ---------------------------------------------------------------- between steps

    def abandon(self) -> None:
        """The function has returned: a step that it has opened and not committed is not this worker's any more."""
        self.checks.body_over()
        if self.gradients.refused is not None:
            raise self.gradients.refused
        step = self.opened
        if step is not None and step.settled and step.summary is not None and not step.summary.applies:
            self._settle_last()
        elif step is not None:
            step.closed = True
        self.generations.await_confirmation()

    def light_when_opened(self) -> dict[str, Any] | None:
        """In the middle of a step: what it began from (:meth:`Replica.light`), and not what this worker's passes and
        the body have made of it; None between steps."""
        return self._restore_point.light if self.open_body is not None else None

    @property
    def body_is_void(self) -> bool:
        """Whether the step has come to nothing, while the loop's body goes on: it runs once more."""
        return self._restore_point.is_due

    def close_down(self) -> None:
        """Take everything off torch that was put there."""
        self.checks.body_over()
        self.gradients.close()

    def doing(self, waits: bool) -> str:
        """Where the training thread is, in words."""
        step, number = self.opened, self.cursor.step
        if step is None:
            return "waiting for the others before its first step" if waits else "before its first step"
        if step.closed:
            return f"after step {number}, " + ("waiting for the others" if waits else "in the function's own code")
        if step.settled:
            return f"in step {step.number}, after backward()"
        if step.handed_over_at:
            return f"in step {step.number}, waiting for the others' gradients"
        num = len(step.micro)
        part = f", pass {max(1, len(step.weights))} of {num}" if num > 1 else ""
        return f"computing step {step.number}{part}"

    def _loop_goes_on(self, before: OpenStep, now: float) -> None:
        """The loop asks for what comes after a step that is done; at an epoch's end it does so twice."""
        if before.left_at is not None:
            before.away_s += now - before.left_at
            before.cpu.goes_on()
            before.left_at = None
        elif before.own:
            self.passes.memory.passed(max(map(len, before.micro)))

    def _tell_timing(self, before: OpenStep, step: OpenStep) -> None:
        """From one opening to the next is a step's time. An epoch's last batch may be a small one: speeds are told of
        full ones."""
        full = len(before.batch) == self.passes.plan.full_batch
        if before.record is not step.record or not full or before.rehearses or before.watched:
            return
        cycle_s = step.started - before.started - before.away_s
        waited_s = before.waited_s - before.cpu.own_part_s(before.waited_s, cycle_s)
        self.timings.step_done(sum(map(len, before.micro)), waited_s, cycle_s, stand_in=not before.own)
