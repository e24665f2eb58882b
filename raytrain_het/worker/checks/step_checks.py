"""What is looked at in every step, so that nothing goes wrong silently: model, loss, samples, replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from raytrain_het.allreduce.step_summary import StepSummary
from raytrain_het.errors import ReplicaMismatchError
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.message_parts import ReplicaAudit
from raytrain_het.membership.protocol import Audit, Claim, Event
from raytrain_het.worker.checks.body_watch import BodyWatch
from raytrain_het.worker.checks.losses import LossCheck, Root
from raytrain_het.worker.checks.rehearsal import Rehearsal
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.data.data_plan import DataPlan, slice_of
from raytrain_het.worker.state.replica_check import ReplicaCheck
from raytrain_het.worker.state.structure import Structure

if TYPE_CHECKING:
    from raytrain_het.worker.step.gradients import Gradients
    from raytrain_het.worker.step.open_step import OpenStep

HUB_S = 10.0
"""So long a worker waits for the hub to end the run."""
EVERY_MODULE_STEPS = 20
"""In a run's first steps no module is passed over when the model's structure is looked at."""


class StepChecks:
    """One worker's. Used by the training thread.

    Args:
        agent: tells the hub what was found.
        plan: the order of samples, which must be the same on all.
        structure: whether model and optimizer are still what they were.
        loss: whether the loss is what the program says.
        replica: whether all members' replicas are the same.
        rehearsal: whether the means are those of one process, in a run's first steps.
    """

    def __init__(
        self,
        agent: MemberAgent,
        plan: DataPlan,
        structure: Structure,
        loss: LossCheck,
        replica: ReplicaCheck,
        rehearsal: Rehearsal,
    ) -> None:
        self.loss, self.replica = loss, replica
        self._agent, self._plan = agent, plan
        self._structure, self._rehearsal = structure, rehearsal
        self._body = BodyWatch()
        self._step: OpenStep | None = None
        self._pass_weight = 0.0

    # ---------------------------------------------------------------- a step opens

    def look_at_model(self, cursor: Cursor) -> None:
        """
        Raises:
            NotSupportedError: the model or the optimizer is another one than at the beginning.
        """
        self._structure.check(cursor.step, everything=cursor.offset == 0 or cursor.step < EVERY_MODULE_STEPS)

    def begin(self, step: OpenStep, light: dict[str, Any], *, first: bool) -> None:
        """A step is opened: say which of its passes are looked at, and look at the replica.

        Args:
            step: may get another pass, of the whole batch.
            light: what the step begins from.
            first: whether this worker has done no step yet.
        """
        self._step, cursor = step, step.cursor
        step.looked = self.replica.look(step.number, light, self._numbers_besides(cursor))
        step.rehearses = self._rehearsal.is_due(step.record, step.rank, cursor.step)
        if step.rehearses:
            step.micro = [step.batch, *step.micro]
        # A program may begin something else at an epoch; so in the first step of epochs 0, 1, 2, 4, 8 ...
        at_beginning = first or cursor.offset == 0 and cursor.epoch & (cursor.epoch - 1) == 0
        step.watched = at_beginning and len(step.own) > 0 and not self.loss.is_local and not step.is_alone
        self.loss.begin_step()

    def _numbers_besides(self, cursor: Cursor) -> dict[str, Any]:
        """What else must be the same on all members in this step."""
        return {
            "the position in the data (epoch, offset, step)": str(list(cursor.to_dict().values())),
            "the order of the epoch's samples": self._plan.order_digest(cursor.epoch),
        }

    # ---------------------------------------------------------------- a pass

    def pass_begins(
        self, step: OpenStep, index: int, weight: float, weigh: Callable[[Any], float] | None = None
    ) -> None:
        """The loop's body gets the inputs of this pass next. ``weigh`` gives the weights of others like it."""
        self._pass_weight = weight
        if index == 0 and step.watched:
            self._body.begin(step.inputs, len(step.micro[0]), weigh)

    def inspect(self, roots: Sequence[Root]) -> Exception | None:
        """A backward pass begins: is the loss what the program says? With one pass a step by one worker it does not
        matter.

        Returns:
            An error, to be raised if the pass is one of the step's.
        """
        step = self._step
        if step is None or step.is_alone:
            return None
        samples = len(step.micro[len(step.weights) - 1])
        record, passes = step.record, step.micro[step.rehearses :]
        sizes = {len(slice_of(step.batch, record.shares, rank)) for rank in range(len(record.members))} - {0}
        alike = len(sizes) == 1 and len({len(part) for part in passes}) == 1
        error = self.loss.look(roots, self._pass_weight, step.loss_scale, samples=samples, alike=alike)
        if error is None and (how := self._body.met(roots)) is not None:
            error = refuse("samples that see each other", f"they meet in {how}")
        return error

    def body_over(self) -> None:
        """The loop's body is over, or was left: nothing of it is followed any more."""
        self._body.end()

    # ---------------------------------------------------------------- the result

    def headers_came(self, step: OpenStep, summary: StepSummary) -> None:
        """What members say of themselves in a step's headers: where they differ the hub hears of it.

        Raises:
            ReplicaMismatchError: workers' losses are means over other things.
        """
        if summary.losses_differ:
            self._end_for_unlike_losses(step.cursor.step)
        # Unlike members' digests always differ: they tell samples now and then.
        due = not step.record.is_unlike or step.cursor.step < 3 or step.cursor.step % 10 == 0
        if summary.replicas_differ and step.looked is not None and due:
            self._agent.tell(
                Audit(
                    step=step.cursor.step,
                    part=step.looked.part,
                    generation=step.job.generation,
                    audit=ReplicaAudit(**self.replica.audit(step.looked)),
                )
            )

    def means_came(self, step: OpenStep, summary: StepSummary, gradients: Gradients) -> None:
        """
        Raises:
            ReplicaMismatchError: they are others than those of the whole batch, and nothing explains it.
        """
        if not (step.rehearses and summary.applies):
            return
        at, record = step.cursor.step, step.record
        means = gradients.mean_gradients(scale=step.loss_scale)
        event = self._rehearsal.compare(at, means, gradients.reference, record)
        self._rehearsal.compare_buffers(at, gradients.buffers.values(), gradients.buffers_of_reference, record)
        self._agent.tell(Event(event=event))

    def _end_for_unlike_losses(self, step: int) -> None:
        """Workers' losses are means over other things. No update is made of that: the hub is told of each worker's, and
        ends the run with both; without a hub, this worker says its own."""
        name = "over how many numbers the loss is a mean (in all, and for each sample)"
        self._agent.tell(Claim(step=step, name=name, value=self.loss.terms))
        self._agent.wait_for(lambda: False, timeout=HUB_S)
        raise ReplicaMismatchError(
            f"step {step + 1}: {name} is {self.loss.terms} here, and something else on another worker. Say what the "
            "loss is: prepare_data_loader(loss=..., weight=...)."
        )
