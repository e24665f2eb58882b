"""A step's batch: this worker's slice of it, the passes that the slice is cut into, and the weight of each pass."""

from __future__ import annotations

from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.record import Record
from raytrain_het.worker.checks.losses import LossCheck
from raytrain_het.worker.data.data_plan import DataPlan, micro_batches, slice_of
from raytrain_het.worker.step.memory import FIRST, MemoryLimit
from raytrain_het.worker.step.open_step import OpenStep


class Passes:
    """Cuts and weighs one worker's passes.

    Args:
        plan: the order of samples.
        micro_batch_size: most samples of a pass, as the user allows; None is no limit.
        memory: most samples of a pass, as they fit.
        loss: what the program says of its loss.
    """

    def __init__(self, plan: DataPlan, micro_batch_size: int | None, memory: MemoryLimit, loss: LossCheck) -> None:
        self.plan, self.memory = plan, memory
        self._micro_batch_size, self._loss = micro_batch_size, loss

    def cut(self, record: Record, rank: int, cursor: Cursor) -> tuple[range, range, list[range]]:
        """The step's batch, this worker's slice, and its passes.

        A share of 0 still runs the loop's body, on a stand-in, so that the program behaves alike; the gradient is
        dropped."""
        batch = self.plan.batch_at(cursor)
        own = slice_of(batch, record.shares, rank)
        return batch, own, self._passes(own) if own else [self._stand_in(batch, cursor.epoch)]

    def _stand_in(self, batch: range, epoch: int) -> range:
        """Two samples, since a batch norm of one raises."""
        size = self.plan.epoch_size(epoch)
        start = max(0, min(batch.start, size - 2))
        return range(start, min(start + 2, size))

    def _passes(self, samples: range) -> list[range]:
        """Cut what one forward pass can't hold, by what the user allows, and by what fits into memory."""
        allowed, fits = self._micro_batch_size, self.memory.samples
        if fits is None or allowed is not None and allowed <= fits:
            return micro_batches(samples, allowed)
        return micro_batches(samples, fits, least=FIRST)

    def cut_rest_anew(self, step: OpenStep) -> None:
        """Passes grow within a step too, as soon as it is known that larger ones fit."""
        done = len(step.weights)
        if step.own and done < len(step.micro) and self.memory.samples is not None:
            self.memory.passed(max(map(len, step.micro[:done])))
            step.micro[done:] = self._passes(range(step.micro[done].start, step.own.stop))

    def weigh(self, step: OpenStep, index: int, weight: float) -> tuple[float, float]:
        """A pass begins; ``weight`` is its number of samples, or the user's measure.

        Its weight is its part of ``w_i = b_i r_i``; of ``r_i`` alone where sums of gradients are not divided. Of a
        loss that is a sum over samples, gradients are added up as they are, times ``r_i``; the weights' sum, by which
        they are divided, is ``sum_i b_i r_i / B``.

        Returns:
            What the pass's gradients are multiplied by, and what changes of buffers are.
        """
        counts = step.contributes and not (step.rehearses and index == 0)
        samples, normalised = len(step.micro[index]), step.record.normalised
        part = weight if normalised else samples / len(step.own) if step.own else 0.0
        if self._loss.is_sum and normalised:
            part = samples / len(step.batch)
        step.weights.append(part * step.gradient_weight if counts else 0.0)
        if index == len(step.micro) - 1:
            step.contributes = step.weight > 0
        of_gradient = step.gradient_weight if self._loss.is_sum and step.contributes else step.weights[-1]
        # What travels is not scaled: it is in fp32, and other workers may have another scale, or none.
        return of_gradient / step.loss_scale, step.weights[-1]
