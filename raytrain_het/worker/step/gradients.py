"""Local gradients: hooks on the parameters gather them, weighted, into buckets, and hand the means back.

Symbols: ``b_j`` the weight of micro-batch ``j`` (its samples, or the user's measure), ``g_j`` its mean gradient. What a
member sends is ``w g = sum_j b_j g_j``: exact sums, so that cutting a share into micro-batches changes nothing.

A parameter's gradient belongs to three in turn. Autograd makes it; the hook adds it to a bucket and drops it; after the
step's last pass the program's own hooks get the mean, and ``p.grad`` is what they make of it, added to what the user
had left there, as autograd would add it. The mean is the user's: nobody writes there any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from raytrain_het.allreduce import points
from raytrain_het.allreduce.jobs import ABORTED, LocalBucket, SendBuffers, StepJob
from raytrain_het.allreduce.layout import Layout, is_finite
from raytrain_het.allreduce.reducers import SendBuffer
from raytrain_het.allreduce.sums import Sums
from raytrain_het.errors import LoopOrderError
from raytrain_het.worker.checks.losses import Root
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.state.buffers import BufferSync
from raytrain_het.worker.step.backward_watch import BackwardWatch
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
        self.model = model
        self.buffers = BufferSync(model)
        self.layout = Layout(named, self.buffers.travelling(), bucket_bytes, small_apart=small_apart)
        self.buffers.bind(self.layout)
        by_name = dict(named)
        self.locals: list[torch.Tensor] = []
        self.means: list[torch.Tensor] = []
        """By bucket: where the step's mean goes (n,). The user gets them as gradients, so each step has new ones."""
        self._params: list[nn.Parameter] = []
        self._slots: list[tuple[int, int]] = []
        self._gradient_buckets = [b for b in self.layout.buckets if not b.is_state]
        for bucket in self.layout.buckets:
            device = by_name[bucket.segments[0].name].device if not bucket.is_state else torch.device("cpu")
            # Not zeroed: a bucket that is gathered in its message leaves these pages untouched.
            self.locals.append(torch.empty(bucket.numel, dtype=bucket.dtype, device=device))
            if bucket.is_state:
                continue
            for place, segment in enumerate(bucket.segments):
                self._slots.append((bucket.index, place))
                self._params.append(by_name[segment.name])
        must_be_zero = {id(p) for p in (self._params if zeroed is None else zeroed)}
        self._zeroed = [id(p) in must_be_zero for p in self._params]
        self._parts: list[list[SendBuffer]] = []
        """By bucket: the places in which it is gathered."""
        self._targets: list[list[SendBuffer]] = []
        """By parameter: the same, cut to the parameter; one place of its shape, or several flat ones."""
        self._send_buffers: SendBuffers | None = None
        self._gather_in(None)
        self._nothing_yet()
        self._job = StepJob(0, 0, ABORTED)
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

    def _nothing_yet(self) -> None:
        """Of steps and passes."""
        self._found: list[torch.Tensor | None] = [None] * len(self._params)
        """What was in ``p.grad`` before the pass."""
        self._left: list[torch.Tensor | None] = [None] * len(self._params)
        """What was there before the step: the mean is added to it."""
        self._stands_in = False
        """Whether zeros stand in ``p.grad``, between the passes of a step or until it is done again. What the loop's
        body does to them it does to no gradient."""
        self._touched = [False] * len(self._params)
        self._fired: set[int] = set()
        self._missing: list[int] = []
        """By bucket: tensors of which the last pass has yet to bring the gradient."""
        self._used = [0] * len(self.layout.buckets)
        """By bucket: bit ``k`` is set if tensor ``k`` has a gradient."""
        self._num_full = self._num_handed_over = 0
        self._contributes = False
        self._armed = self._in_backward = self._nested = self._creates_graph = False
        self.reference: dict[str, torch.Tensor] = {}
        """By parameter: the gradient of the whole batch, after a rehearsal."""
        self.buffers_of_reference: dict[str, torch.Tensor] = {}
        """By buffer: what the whole batch has made of it."""
        self._publishes = False
        """Whether means are being accumulated, and not a pass's gradients."""
        self._rehearses = self._ended = False
        """Whether the armed micro-batch's backward pass is over."""
        self._complaint: Exception | None = None
        self.refused: Exception | None = None
        """Why a pass was refused, in case that the program goes on as if it had not been."""
        self._overlaps: bool | None = None
        """Whether buckets may be sent before the pass is over: not in the first one, and never once a parameter has had
        its gradient in parts."""
        self._again = False
        self._num_passes = self._num_counted = 0
        self._weight = self._weight_of_buffers = 0.0
        self._last = False

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
        send_buffers: SendBuffers | None = None,
    ) -> None:
        """A step is opened: nothing is gathered yet.

        Args:
            job: once it is over nothing is gathered any more.
            on_full: called with buckets that are full, in layout order.
            on_backward_done: called when a pass is over, with whether it was the step's last.
            send_buffers: where gradients are gathered, as far as they can be; else in buckets of their own.
        """
        self._job = job
        if send_buffers is not self._send_buffers:
            self._gather_in(send_buffers)
        self._on_full, self._on_backward_done = on_full, on_backward_done
        self._touched = [False] * len(self._params)
        self._used = [0] * len(self.layout.buckets)
        self._num_full = self._num_handed_over = self._num_passes = self._num_counted = 0
        self.buffers.begin()

    def _gather_in(self, send_buffers: SendBuffers | None) -> None:
        self._send_buffers = send_buffers
        self._parts, self._targets = [], []
        for bucket, local in zip(self.layout.buckets, self.locals, strict=True):
            there = send_buffers[bucket.index] if send_buffers is not None and local.device.type == "cpu" else None
            self._parts.append(there or [(0, bucket.numel, local)])
        for index, place in self._slots:
            segment = self.layout.buckets[index].segments[place]
            target: list[SendBuffer] = []
            for start, stop, values in self._parts[index]:
                low, high = max(start, segment.offset), min(stop, segment.stop)
                if low < high:
                    target.append((low - segment.offset, high - segment.offset, values[low - start : high - start]))
            if len(target) == 1:
                target = [(0, segment.numel, target[0][2].view(segment.shape))]
            self._targets.append(target)

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
        if last:
            counts = [0] * len(self.layout.buckets)
            for bucket, _ in self._slots:
                counts[bucket] += 1
            self._missing = counts

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
        self._found = [p.grad for p in self._params]
        if not self._stands_in:
            self._left = self._found
        for p in self._params:
            p.grad = None
        if self._last and not self._job.over:
            self.means = self._places_for_means()

    def _places_for_means(self) -> list[torch.Tensor]:
        """Those of the step before where nobody holds a part of them any more, since new memory has to be faulted in;
        else new ones."""
        before: Sequence[torch.Tensor | None] = self.means or [None] * len(self.locals)
        return [
            old if old is not None and _is_ours_alone(old) else torch.empty_like(local)
            for old, local in zip(before, self.locals, strict=True)
        ]

    def _begins_inside(self) -> None:
        self._nested = True

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        bucket, place = self._slots[index]

        def gathered(p: torch.Tensor) -> None:
            if self._publishes:
                return
            if not self._fired or self._ended:
                self._begin_gathering()
            job = self._job
            if index in self._fired:
                self._comes_again(index)
            else:
                self._fired.add(index)
                if self._last:
                    self._missing[bucket] -= 1
            grad, p.grad = p.grad, None
            if job.over:
                return
            if self._rehearses:
                name = self._name(index)
                if grad is not None:
                    self.reference[name] = self.reference[name] + grad if name in self.reference else grad
                return
            if grad is not None and grad.is_sparse:
                raise refuse("sparse gradient", f"that of {self._name(index)!r} is")
            # It has none if requires_grad was taken off between the forward and the backward pass.
            if grad is not None and self._contributes and self._weight:
                self._gather(index, grad)
            elif self._last and not self._touched[index]:
                self._zero(index)
            if self._last:
                self._used[bucket] |= (1 << place) if self._touched[index] else 0
                if self._overlaps and not self._nested:
                    self._hand_over_full()

        return gathered

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
        for index, left in enumerate(self._left):
            if left is not None and self._zeroed[index] and bool(left.any()):
                raise LoopOrderError(
                    "backward() ran without optimizer.zero_grad() since the last step, so it would add to the old "
                    f"gradients, that of {self._name(index)!r} the first of them: call optimizer.zero_grad() before "
                    "backward()."
                )
        points.reach("backward", self._job.step)

    def _comes_again(self, index: int) -> None:
        """The parameter's gradient comes in parts."""
        if self._last and self._slots[index][0] < self._num_full:
            raise refuse("gradient in parts", f"that of {self._name(index)!r} has come again")
        self._again = True

    def _gather(self, index: int, grad: torch.Tensor) -> None:
        target = self._targets[index]
        if len(target) > 1:
            grad = grad.reshape(-1)
        for start, stop, view in target:
            part = grad if len(target) == 1 else grad[start:stop]
            if self._touched[index]:
                view.add_(part, alpha=self._weight)
            elif part.dtype == view.dtype:
                torch.mul(part, self._weight, out=view)
            else:
                view.copy_(part).mul_(self._weight)
        self._touched[index] = True

    def _zero(self, index: int) -> None:
        for _, _, view in self._targets[index]:
            view.zero_()

    def _hand_over_full(self) -> None:
        """Hand over all full buckets that come next in the launch order."""
        while self._num_full < len(self._gradient_buckets) and self._missing[self._num_full] == 0:
            self._num_full += 1
        if self._num_full > self._num_handed_over:
            self._hand_over(self._num_full)

    def _hand_over(self, count: int) -> None:
        """Hand over the first ``count`` buckets, as far as they are not."""
        full = range(self._num_handed_over, count)
        self._num_handed_over = count
        self._on_full([self._bucket(k) for k in full])

    def _bucket(self, k: int) -> LocalBucket:
        parts, local = self._parts[k], self.locals[k]
        looked_at = self._contributes and k < len(self._gradient_buckets)
        finite = not looked_at or all(is_finite(values) for _, _, values in parts)
        return LocalBucket(local if parts[0][2] is local else None, finite, self._used[k])

    def _ends(self) -> None:
        """The outermost pass is over: what had no gradient counts as zero; then the sums are waited for."""
        self._in_backward = False
        self._hooks.put_back()
        if not self._armed or self._ended:
            return
        if not self._fired:  # It was a pass through other models.
            for p, found in zip(self._params, self._found, strict=True):
                p.grad = found
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
            self.buffers.gather(self.locals, self._weight_of_buffers, first=self._num_counted == 0)
            self._num_counted += 1
        self._num_passes += 1
        if not self._last:
            self.publish(None)  # Zeros, so that clipping or a loss scaler in the loop's body finds what it expects.
        elif not job.over:
            for index, (bucket, place) in enumerate(self._slots):
                if index in self._fired:
                    continue
                if not self._touched[index]:
                    self._zero(index)
                else:
                    self._used[bucket] |= 1 << place
                self._missing[bucket] -= 1
            self._hand_over_full()
            self._hand_over(len(self.layout.buckets))
        self._on_backward_done(self._last)

    # ---------------------------------------------------------------- its result

    def publish(self, sums: Sums | None, *, scale: float = 1.0) -> None:
        """Make every ``p.grad`` its mean, times the loss's scale, which a scaler will take off again; zeros where the
        step came to nothing. It is added to what the user had left there.

        None where nobody had a gradient. Where some worker's was not finite, all are NaN: a codec may send an overflow
        as something finite, and every loss scaler has to see it.
        """
        means = [
            out.split([s.numel for s in b.segments]) for b, out in zip(self._gradient_buckets, self.means, strict=False)
        ]
        hooked: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, (bucket, place) in enumerate(self._slots):
            p, left = self._params[index], self._left[index]
            if sums is None:
                p.grad = torch.zeros_like(p, memory_format=torch.preserve_format)
                continue
            if not sums.used[bucket] >> place & 1:
                p.grad = left
                continue
            mean = means[bucket][place].view(p.shape).data  # No view: it may be detached in place.
            if not sums.finite:
                mean.fill_(torch.nan)
            elif scale != 1:
                mean.mul_(scale)
            if mean.dtype != p.dtype or mean.stride() != p.stride():
                mean = torch.empty_like(p, memory_format=torch.preserve_format).copy_(mean)
            if self._hooks.on(index):
                p.grad = left
                hooked.append((p, mean))
            else:
                p.grad = mean if left is None else left.add_(mean)
        self._found, self._stands_in = [], sums is None
        if sums is not None:
            self._left = [None] * len(self._params)
        if hooked:
            self._publishes = True
            try:
                self.watch.accumulate(*zip(*hooked, strict=True))
            finally:
                self._publishes = False

    def mean_gradients(self, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """By parameter: the mean of all workers' gradients in this step, times the loss's scale."""
        gradients = [(b, out) for b, out in zip(self.layout.buckets, self.means, strict=True) if not b.is_state]
        return {s.name: out[s.offset : s.stop].view(s.shape) * scale for b, out in gradients for s in b.segments}

    def adopt(self, means: Sequence[torch.Tensor]) -> None:
        """The means of a step came from a peer, by bucket."""
        self.means = [mean.to(local.device) for mean, local in zip(means, self.locals, strict=True)]

    def clear(self) -> None:
        """Forget all gradients, and the step that was open."""
        self.buffers.forget()
        self._found, self._left, self._stands_in = [], [None] * len(self._params), False
        for p in self._params:
            p.grad = None

    def nonfinite_parameters(self) -> list[str]:
        """Names of the parameters whose local gradient is not finite."""
        return [
            self._name(i)
            for i, target in enumerate(self._targets)
            if self._touched[i] and not all(is_finite(view) for _, _, view in target)
        ]

    def _name(self, index: int) -> str:
        bucket, place = self._slots[index]
        return self.layout.buckets[bucket].segments[place].name


def _is_ours_alone(t: torch.Tensor) -> bool:
    """Whether no other tensor has this one's memory."""
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata) <= _ONE_HOLDER


_ONE_HOLDER = torch._C._storage_Use_Count((_alone := torch.empty(1)).untyped_storage()._cdata)
"""What torch counts for a tensor whose memory is its own: the tensor, and who asks."""
del _alone
