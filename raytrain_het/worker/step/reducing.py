"""From full buckets to means: the training thread's side of a step's all-reduce."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from raytrain_het.allreduce.communicator import Communicator
from raytrain_het.allreduce.jobs import Contribution, LocalBucket, Result, StepJob, StepResult
from raytrain_het.worker.checks.step_checks import StepChecks
from raytrain_het.worker.step.generations import Generations
from raytrain_het.worker.step.gradients import Gradients
from raytrain_het.worker.step.open_step import Counters, OpenStep
from raytrain_het.worker.step.timings import Timings


class Reducing:
    """Hands buckets over, and waits until the step has its means or is to be done again.

    Args:
        communicator: does the all-reduce, in its own thread.
        generations: in which generation a step goes on that was voided.
        gradients: gathers buckets, and takes the means.
        checks: what is said of this worker in the step's first header, and looked at in the result.
        timings: what steps take.
        counters: of this worker.
    """

    def __init__(
        self,
        communicator: Communicator,
        generations: Generations,
        gradients: Gradients,
        checks: StepChecks,
        timings: Timings,
        counters: Counters,
    ) -> None:
        self.timings = timings
        self.on_failed: list[Callable[[], None]] = []
        """Called when a step has come to nothing, before the loop's body goes on."""
        self._comm, self._generations, self._gradients = communicator, generations, gradients
        self._checks, self.counters = checks, counters

    def begin(self, step: OpenStep) -> None:
        """A step is opened: gradients are gathered for it, and others' parts of it may come."""
        # What an earlier codec has left out is added to buckets of their own.
        in_messages = None if self._comm.codec_states.has_earlier_residual else self._generations.send_buffers
        self._gradients.begin(
            step.job,
            on_first=lambda: self._generations.agent.points.reach("backward", step.number),
            on_full=lambda buckets: self._hand_over(step, buckets),
            on_backward_done=lambda last: self._backward_done(step) if last else None,
            send_buffers=in_messages,
        )

    def submit(self, step: OpenStep) -> None:
        """From here on the communication thread takes what others send."""
        self._comm.submit(step.job)

    def _hand_over(self, step: OpenStep, buckets: Sequence[LocalBucket]) -> None:
        contribution = step.job.contribution or self._contribution(step)
        last = len(step.job.buckets) + len(buckets) == len(self._gradients.layout.buckets)
        step.job.hand_over(contribution, buckets, last=last)
        self._comm.wake()
        if last:
            step.handed_over_at = time.monotonic()

    def _contribution(self, step: OpenStep) -> Contribution:
        looked = step.looked
        return Contribution(
            means=self._gradients.means,
            weight=step.weight,
            contributes=step.contributes,
            digest=looked.digest() if looked is not None else 0,  # Not before: a GPU may have been at it.
            numbers=looked.numbers if looked is not None else 0,
            loss=self._checks.loss.mark,
        )

    def _backward_done(self, step: OpenStep) -> None:
        """The step's last pass is over. Comes out of the user's ``backward()``, and so does what is raised here."""
        step.handed_over_at = step.handed_over_at or time.monotonic()
        self._generations.agent.points.reach("arrived", step.number)
        step.cpu.waiting_begins()
        self._await_sums(step)
        step.cpu.waiting_ends()
        step.settled = True
        if step.summary is None:
            for listener in self.on_failed:
                listener()
        else:
            self._checks.headers_came(step, step.summary)
            self._gradients.buffers.settle(self._gradients.means, step.summary.applies, own=step.contributes)
            self._checks.means_came(step, step.summary, self._gradients)
        self._gradients.publish(step.summary, scale=step.loss_scale)
        now = time.monotonic()
        self.counters.compute_s += step.handed_over_at - step.started
        self.counters.wait_s += now - step.handed_over_at

    def _await_sums(self, step: OpenStep) -> None:
        """Wait until the step has its sums (perhaps from a peer that had them), or is to be done again."""
        self._generations.agent.wait_for(lambda: step.job.over)
        result = step.job.result
        if result is not None and result.error is not None:
            raise result.error
        if isinstance(result, StepResult):
            step.summary, step.waited_s = result.summary, result.waited_s
            self._generations.send_buffers = result.send_buffers
            self.timings.saw(result.paths, result.errors)
        else:
            self.resolve(step)

    def resolve(self, step: OpenStep) -> None:
        """The generation is void: see from the next one what became of the step. Where it is that one's base, its sums
        are here or come from a peer; else it is done again, and has none."""
        entered = self._generations.entered_after(step.job.generation)
        had, step.summary = step.summary, None
        if entered.replayed is not None and entered.record.base == entered.replayed[0].step == step.number:
            step.summary, means = entered.replayed
            step.job = StepJob(entered.record.number, step.number, Result(), cursor=step.cursor)
            if had is None:
                self._gradients.adopt(means)
            # Else they are the same to the bit, and what the user did to them since (clipping) stays.
