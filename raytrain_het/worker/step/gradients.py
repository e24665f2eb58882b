"""Local gradients: hooks on the parameters gather them, weighted, into buckets, and hand the means back.

Symbols: ``b_j`` the weight of micro-batch ``j`` (its samples, or the user's measure), ``g_j`` its mean gradient. What a
member sends is ``w g = sum_j b_j g_j``: exact sums, so that cutting a share into micro-batches changes nothing.

A parameter's gradient belongs to three in turn. Autograd makes it. The hook adds it to a bucket (:mod:`.buckets`) and
drops it. After the step's last pass the program's own hooks get the mean, and ``p.grad`` is what they make of it
(:mod:`.grad_fields`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from raytrain_het.allreduce.jobs import ABORTED, LocalBucket, SendBuffers, StepJob
from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.step_summary import StepSummary
from raytrain_het.errors import LoopOrderError
from raytrain_het.worker.checks.losses import Root
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.state.buffers import BufferSync
from raytrain_het.worker.step.backward_watch import BackwardWatch
from raytrain_het.worker.step.buckets import Buckets
from raytrain_het.worker.step.grad_fields import GradFields
from raytrain_het.worker.step.trained import trained
from raytrain_het.worker.step.user_hooks import UserHooks


class Gradients:
    """The training thread's end of the all-reduce.

    After the last micro-batch's ``backward()`` every ``p.grad`` is the weighted mean over all members, as with torch's
    DDP, so clipping and logging of gradients work as they do there.

    Args:
        model: the user's model; it is not wrapped, only its parameters get hooks.
        bucket_bytes: target size of a bucket.
        small_apart: see :class:`~raytrain_het.allreduce.layout.Layout`.
        zeroed: the parameters whose gradients the loop has to zero: the optimizer's. None is all of them.

    Raises:
        ConfigError: no parameter is trained, or one is of a kind that cannot travel.
    """

    def __init__(
        self,
        model: nn.Module,
        bucket_bytes: int,
        *,
        small_apart: bool = False,
        zeroed: Sequence[torch.Tensor] | None = None,
    ) -> None:
        named = trained(model)
        self.buffers = BufferSync(model)
        layout = Layout(named, self.buffers.travelling(), bucket_bytes, small_apart=small_apart)
        self.buffers.bind(layout)
        self._buckets = Buckets(layout, dict(named))
        self._params = self._buckets.params
        self._fields = GradFields(layout, self._params, self._buckets.places)
        must_be_zero = {id(p) for p in (self._params if zeroed is None else zeroed)}
        self._zeroed = [id(p) in must_be_zero for p in self._params]
        self._no_pass_yet()
        self._job = StepJob(0, 0, ABORTED)
        self._on_first: Callable[[], None] = lambda: None
        self._on_full: Callable[[Sequence[LocalBucket]], None] = lambda buckets: None
        self._on_backward_done: Callable[[bool], None] = lambda last: None
        self.inspect: Callable[[Sequence[Root]], Exception | None] = lambda roots: None
        """Looks at the roots of each pass, before it; what it returns is raised if the pass is one of the step's."""
        self.inspect_fired: Callable[[], Exception | None] = lambda: None
        """Called once it is; what it returns is raised."""
        self.watch = BackwardWatch(begins=self._begins, nested=self._begins_inside, ends=self._ends)
        self._handles = [
            p.register_post_accumulate_grad_hook(self._hook(index)) for index, p in enumerate(self._params)
        ]
        self._hooks = UserHooks(self._params, {handle.id for handle in self._handles})
        self.watch.install()

    def _no_pass_yet(self) -> None:
        self._armed = self._in_backward = self._ended = False
        """Whether a pass of the step is expected, is under way, is over."""
        self._nested = self._creates_graph = self._again = False
        """Whether it has passes inside, makes a graph, has brought a parameter's gradient in parts."""
        self._rehearses = self._publishes = False
        """Whether it counts for nothing; whether means are being accumulated, and not a pass's gradients."""
        self._fired: set[int] = set()
        """Parameters that have had their gradient in it."""
        self._weight = self._weight_of_buffers = 0.0
        self._contributes = self._last = False
        self._num_passes = self._num_counted = 0
        self.reference: dict[str, torch.Tensor] = {}
        """By parameter: the gradient of the whole batch, after a rehearsal."""
        self.buffers_of_reference: dict[str, torch.Tensor] = {}
        """By buffer: what the whole batch has made of it."""
        self._complaint: Exception | None = None
        self.refused: Exception | None = None
        """Why a pass was refused, in case that the program goes on as if it had not been."""
        self._overlaps: bool | None = None
        """Whether buckets may be sent before the pass is over: not in the first one, and never once a parameter has had
        its gradient in parts."""

    @property
    def layout(self) -> Layout:
        """The buckets."""
        return self._buckets.layout

    @property
    def means(self) -> list[torch.Tensor]:
        """By bucket: where the step's mean goes (n,)."""
        return self._fields.means

    def close(self) -> None:
        """Take the hooks off."""
        self.watch.remove()
        self._hooks.put_back()
        for handle in self._handles:
            handle.remove()

    # ---------------------------------------------------------------- a step

    def begin(
        self,
        job: StepJob,
        *,
        on_full: Callable[[Sequence[LocalBucket]], None],
        on_backward_done: Callable[[bool], None],
        on_first: Callable[[], None] = lambda: None,
        send_buffers: SendBuffers | None = None,
    ) -> None:
        """A step is opened: nothing is gathered yet.

        Args:
            job: once it is over nothing is gathered any more.
            on_first: called when the first gradient of a pass is here.
            on_full: called with buckets that are full, in layout order.
            on_backward_done: called when a pass is over, with whether it was the step's last.
            send_buffers: where gradients are gathered, as far as they can be; else in buckets of their own.
        """
        self._job = job
        self._on_first, self._on_full, self._on_backward_done = on_first, on_full, on_backward_done
        self._buckets.begin(send_buffers)
        self._num_passes = self._num_counted = 0
        self.buffers.begin()

    def rehearse(self) -> None:
        """The next backward pass is of the whole batch: its gradients are kept as :attr:`reference`, and count for
        nothing."""
        self.arm(0.0, of_buffers=0.0, contributes=False, last=False)
        self._rehearses, self.reference = True, {}

    def arm(self, weight: float, *, of_buffers: float, contributes: bool, last: bool) -> None:
        """The next backward pass is that of a micro-batch of this weight.

        Args:
            weight: by which its gradients are multiplied.
            of_buffers: by which changes of buffers are.
            contributes: whether any of the step's passes so far counts.
            last: whether it is the step's last.
        """
        self._weight, self._weight_of_buffers, self._last, self._armed = weight, of_buffers, last, True
        self._contributes = contributes
        self._fired = set()
        self._nested = self._again = self._ended = False
        self._rehearses = False
        if self._num_passes:
            self.buffers.rewind()

    def disarm(self) -> None:
        """The micro-batch is over. Another backward pass before the next one is an error."""
        self._hooks.put_back()
        self._armed = False

    @property
    def backward_ran(self) -> bool:
        """Whether the armed micro-batch had its backward pass."""
        return bool(self._fired)

    @property
    def backward_failed(self) -> bool:
        """Whether it has raised on the way."""
        return self._in_backward and not self._ended

    # ---------------------------------------------------------------- a backward pass

    def _begins(self, roots: Sequence[Root], create_graph: bool) -> None:
        """An outermost pass begins: what is in ``p.grad`` is the user's, and is put aside."""
        self._in_backward, self._creates_graph, self._complaint = True, create_graph, None
        if not self._armed or self._ended:
            return
        if self._fired:
            raise refuse("skipped batch", f"and began another pass for it, in step {self._job.step}")
        self._hooks.set_aside()
        self._complaint = self.inspect(roots)
        self._fields.set_aside()
        if self._last and not self._job.over:
            self._fields.make_places(self._buckets.locals)

    def _begins_inside(self) -> None:
        self._nested = True

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def gather(p: torch.Tensor) -> None:
            """Autograd has accumulated the parameter's gradient of this pass."""
            if self._publishes:
                return
            if not self._fired or self._ended:
                self._begin_gathering()
            if index in self._fired:
                self._comes_again(index)
            self._fired.add(index)
            grad, p.grad = p.grad, None
            if self._job.over:
                return
            if self._rehearses:
                self._keep_reference(index, grad)
                return
            if grad is not None and grad.is_sparse:
                raise refuse("sparse gradient", f"that of {self._buckets.name(index)!r} is")
            # It has none if requires_grad was taken off between the forward and the backward pass.
            if grad is not None and self._contributes and self._weight:
                self._buckets.add(index, grad, self._weight)
            if self._last:
                self._buckets.complete(index)
                if self._overlaps and not self._nested:
                    full = self._buckets.take_full(contributes=self._contributes)
                    if full:
                        self._on_full(full)

        return gather

    def _keep_reference(self, index: int, grad: torch.Tensor | None) -> None:
        name = self._buckets.name(index)
        if grad is not None:
            self.reference[name] = self.reference[name] + grad if name in self.reference else grad

    def _begin_gathering(self) -> None:
        """The first gradient of a pass is here: is it one that belongs to a step?"""
        if not self._armed:
            raise LoopOrderError(
                "backward() was called outside of a step: take a batch from the prepared loader first "
                "(for x, y in loader: ...), one backward() and one optimizer.step() for each."
            )
        if not self._in_backward:
            raise refuse("backward from elsewhere")
        if self._ended:
            raise refuse("second backward")
        if self._creates_graph:
            raise refuse("create_graph")
        if (complaint := self._complaint or self.inspect_fired()) is not None:
            self.refused = complaint
            raise complaint
        index = self._fields.first_that_is_not_zero(self._zeroed)
        if index is not None:
            raise LoopOrderError(
                "backward() ran without optimizer.zero_grad() since the last step, so it would add to the old "
                f"gradients, that of {self._buckets.name(index)!r} the first of them: call optimizer.zero_grad() "
                "before backward()."
            )
        self._on_first()

    def _comes_again(self, index: int) -> None:
        """The parameter's gradient comes in parts."""
        if self._last and self._buckets.is_full(index):
            raise refuse("gradient in parts", f"that of {self._buckets.name(index)!r} has come again")
        self._again = True

    def _ends(self) -> None:
        """The outermost pass is over: what had no gradient counts as zero; then the sums are waited for."""
        self._in_backward = False
        self._hooks.put_back()
        if not self._armed or self._ended:
            return
        if not self._fired:  # It was a pass through other models.
            self._fields.put_back()
            return
        self._ended = True
        if self._nested or self._again:
            self._overlaps = False
        elif self._overlaps is None:
            self._overlaps = True
        job = self._job
        if self._rehearses:
            self.buffers_of_reference = self.buffers.values()
        elif not job.over:
            self.buffers.gather(self._buckets.locals, self._weight_of_buffers, first=self._num_counted == 0)
            self._num_counted += 1
        self._num_passes += 1
        if not self._last:
            self._fields.stand_in()
        elif not job.over:
            self._buckets.complete_rest()
            self._on_full(self._buckets.take_all(contributes=self._contributes))
        self._on_backward_done(self._last)

    # ---------------------------------------------------------------- its result

    def publish(self, summary: StepSummary | None, *, scale: float = 1.0) -> None:
        """Make every ``p.grad`` its mean (:meth:`GradFields.publish`); zeros where the step came to nothing."""
        if summary is None:
            self._fields.stand_in()
            return
        hooked = self._fields.publish(summary, scale=scale, has_hooks=self._hooks.on)
        if hooked:
            self._publishes = True
            try:
                self.watch.accumulate(*zip(*hooked, strict=True))
            finally:
                self._publishes = False

    def mean_gradients(self, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """By parameter: the mean of all workers' gradients in this step, times the loss's scale."""
        return self._fields.by_parameter(scale=scale)

    def adopt(self, means: Sequence[torch.Tensor]) -> None:
        """The means of a step came from a peer, by bucket."""
        self._fields.means = [mean.to(one.device) for mean, one in zip(means, self._buckets.locals, strict=True)]

    def clear(self) -> None:
        """Forget all gradients, and the step that was open."""
        self.buffers.forget()
        self._fields.clear()

    def nonfinite_parameters(self) -> list[str]:
        """Names of the parameters whose local gradient is not finite."""
        return self._buckets.nonfinite_parameters()
