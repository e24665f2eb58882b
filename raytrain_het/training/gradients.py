"""Local gradients: hooks on the parameters gather them, weighted, into buckets, and hand the means back.

Symbols: ``b_j`` the weight of micro-batch ``j`` (its samples, or the user's measure), ``g_j`` its mean gradient. What a
member sends is ``w g = sum_j b_j g_j``: exact sums, so that cutting a share into micro-batches changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from raytrain_het.collectives import points
from raytrain_het.collectives.jobs import StepJob
from raytrain_het.collectives.layout import Layout, is_finite
from raytrain_het.collectives.messages import Wire
from raytrain_het.collectives.sums import Sums
from raytrain_het.errors import ConfigError, LoopOrderError


class Gradients:
    """The training thread's end of the all-reduce.

    After the last micro-batch's ``backward()`` every ``p.grad`` is the weighted mean over all members, as with torch's
    DDP, so clipping and logging of gradients work as they do there.

    Args:
        model: the user's model; it is not wrapped, only its parameters get hooks.
        bucket_bytes: target size of a bucket.
        small_apart: see :class:`~raytrain_het.collectives.layout.Layout`.

    Raises:
        ConfigError: no parameter is trained, or one is of a kind that cannot travel.
    """

    def __init__(self, model: nn.Module, bucket_bytes: int, *, small_apart: bool = False) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            total = sum(1 for _ in model.parameters())
            raise ConfigError(
                f"the model has no trainable parameters ({total} parameters, requires_grad=False on all). "
                "Set p.requires_grad_(True) on those to train before prepare_model()."
            )
        for name, p in named:
            if p.is_complex() or not p.is_floating_point():
                raise ConfigError(
                    f"parameter {name!r} has dtype {p.dtype}: only real floating point can be trained here."
                )
        self.model = model
        buffers = [(n, b) for n, b in model.named_buffers() if not b.is_complex()]
        self._buffers = [(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n, _ in buffers]
        """Where they are, since a module may put a new tensor there at any time."""
        self._before: list[torch.Tensor] = []
        """The buffers when the step was opened."""
        self.layout = Layout(named, buffers, bucket_bytes, small_apart=small_apart)
        by_name = dict(named)
        self.locals: list[torch.Tensor] = []
        self.outs: list[torch.Tensor] = []
        self._params: list[nn.Parameter] = []
        self._slots: list[tuple[int, int]] = []
        self._out_views: list[torch.Tensor] = []
        self._gradient_buckets = [b for b in self.layout.buckets if not b.is_state]
        for bucket in self.layout.buckets:
            device = by_name[bucket.segments[0].name].device if not bucket.is_state else torch.device("cpu")
            # Not zeroed: a bucket that is gathered in its message leaves these pages untouched.
            self.locals.append(torch.empty(bucket.numel, dtype=bucket.dtype, device=device))
            self.outs.append(torch.zeros(bucket.numel, dtype=bucket.dtype, device=device))
            if bucket.is_state:
                continue
            for place, segment in enumerate(bucket.segments):
                p = by_name[segment.name]
                self._slots.append((bucket.index, place))
                self._params.append(p)
                self._out_views.append(self.outs[-1][segment.offset : segment.stop].view(segment.shape))
                p.register_post_accumulate_grad_hook(self._hook(len(self._params) - 1))
        self._parts: list[list[Wire]] = []
        """By bucket: the places in which it is gathered."""
        self._targets: list[list[Wire]] = []
        """By parameter: the same, cut to the parameter; one place of its shape, or several flat ones."""
        self._wires: list[list[Wire] | None] | None = None
        self._aim(None)
        self._shown: list[torch.Tensor | None] = [None] * len(self._params)
        self._touched = [False] * len(self._params)
        self._fired: set[int] = set()
        self._missing: list[int] = []
        self._ready = 0
        self._armed = False
        self._weight = 0.0
        self._last = False
        self._job = StepJob(0, 0, outcome="aborted")
        self._on_ready: Callable[[int], None] = lambda count: None
        self._on_backward_done: Callable[[bool], None] = lambda last: None

    # ---------------------------------------------------------------- a step

    def begin(
        self, job: StepJob, *, on_ready: Callable[[int], None], on_backward_done: Callable[[bool], None],
        wires: list[list[Wire] | None] | None = None,
    ) -> None:  # fmt: skip
        """A step is opened: nothing is gathered yet.

        What is gathered goes into the job, or into its message (``wires``).
        """
        self._job = job
        if wires is not self._wires:
            self._aim(wires)
        self._on_ready, self._on_backward_done = on_ready, on_backward_done
        self._touched = [False] * len(self._params)
        gathered = zip(self.locals, self._parts, strict=True)
        job.locals = [local if parts[0][2] is local else None for local, parts in gathered]
        job.outs = self.outs
        job.finite = [True] * len(self.layout.buckets)
        job.used = [0] * len(self.layout.buckets)
        self._ready = 0
        self._before = [b.detach().clone() for b in self._live_buffers()]

    def _live_buffers(self) -> list[torch.Tensor]:
        buffers = (getattr(module, name) for module, name in self._buffers)
        return [b for b in buffers if b is not None]

    def _aim(self, wires: list[list[Wire] | None] | None) -> None:
        self._wires = wires
        self._parts, self._targets = [], []
        for bucket, local in zip(self.layout.buckets, self.locals, strict=True):
            there = wires[bucket.index] if wires is not None and local.device.type == "cpu" else None
            self._parts.append(there or [(0, bucket.numel, local)])
        for index, place in self._slots:
            segment = self.layout.buckets[index].segments[place]
            target: list[Wire] = []
            for start, stop, values in self._parts[index]:
                low, high = max(start, segment.offset), min(stop, segment.stop)
                if low < high:
                    target.append((low - segment.offset, high - segment.offset, values[low - start : high - start]))
            if len(target) == 1:
                target = [(0, segment.numel, target[0][2].view(segment.shape))]
            self._targets.append(target)

    def arm(self, weight: float, *, last: bool) -> None:
        """The next backward pass is that of a micro-batch of this weight."""
        self._weight, self._last, self._armed = weight, last, True
        self._fired = set()
        if last:
            counts = [0] * len(self.layout.buckets)
            for bucket, _ in self._slots:
                counts[bucket] += 1
            self._missing = counts

    def disarm(self) -> None:
        """The micro-batch is over. Another backward pass before the next one is an error."""
        self._armed = False

    @property
    def backward_ran(self) -> bool:
        """Whether the armed micro-batch had its backward pass."""
        return bool(self._fired)

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        bucket, place = self._slots[index]

        def gathered(p: torch.Tensor) -> None:
            if not self._armed:
                raise LoopOrderError(
                    "backward() was called outside of a step: take a batch from the prepared loader first "
                    "(for x, y in loader: ...), one backward() and one optimizer.step() for each."
                )
            if not self._fired:
                self._check_zeroed()
                points.reach("backward", self._job.step)
                torch.autograd.Variable._execution_engine.queue_callback(self._done)
            if index in self._fired:
                raise LoopOrderError(
                    "backward() ran twice for one batch: add the losses up and call it once, or give "
                    "prepare_data_loader a micro_batch_size to accumulate gradients."
                )
            self._fired.add(index)
            if self._job.over:
                return
            grad = p.grad
            assert grad is not None
            if grad.is_sparse:
                raise ConfigError(f"parameter {self._name(index)!r} has a sparse gradient: build it with sparse=False.")
            if self._job.contributes and self._weight:
                self._gather(index, grad)
                p.grad = None
            elif self._last and not self._touched[index]:
                self._zero(index)
            if self._last:
                self._job.used[bucket] |= (1 << place) if self._touched[index] else 0
                self._missing[bucket] -= 1
                if self._missing[bucket] == 0:
                    self._pass_on()

        return gathered

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

    def _pass_on(self) -> None:
        """Hand over all full buckets that come next in the launch order."""
        before = self._ready
        while self._ready < len(self._gradient_buckets) and self._missing[self._ready] == 0:
            if self._job.contributes:
                self._job.finite[self._ready] = all(is_finite(values) for _, _, values in self._parts[self._ready])
            self._ready += 1
        if self._ready > before:
            self._on_ready(self._ready)

    def _done(self) -> None:
        """The backward pass is over: what had no gradient counts as zero; then the sums are waited for."""
        if not self._job.over and self._last:
            for index, (bucket, place) in enumerate(self._slots):
                if index in self._fired:
                    continue
                if not self._touched[index]:
                    self._zero(index)
                else:
                    self._job.used[bucket] |= 1 << place
                self._missing[bucket] -= 1
            self._pass_on()
            self._fill_buffers()
            self._on_ready(len(self.layout.buckets))
        if not self._last:
            self.show(None)  # Zeros, so that clipping or a loss scaler in the loop's body finds what it expects.
        self._on_backward_done(self._last)

    def _fill_buffers(self) -> None:
        """What travels is the change since the step was opened: exact for constants, whatever they are."""
        weight, place = self._job.weight, 0
        live = self._live_buffers()
        for bucket in self.layout.buckets[len(self._gradient_buckets) :]:
            for segment in bucket.segments:
                target = self.locals[bucket.index][segment.offset : segment.stop].view(segment.shape)
                new, old = live[place], self._before[place]
                change = new.to(target.dtype) - old.to(target.dtype)
                target.copy_(torch.where(new == old, 0, change)).mul_(weight)
                place += 1

    # ---------------------------------------------------------------- its result

    def show(self, sums: Sums | None, *, scale: float = 1.0) -> None:
        """Point every ``p.grad`` at its mean, times the loss's scale, which a scaler will take off again; zeros where
        the step came to nothing.

        None where nobody had a gradient.
        """
        for index, (bucket, place) in enumerate(self._slots):
            p = self._params[index]
            self._shown[index] = None
            if sums is None:
                self._out_views[index].zero_()
            elif not sums.used[bucket] >> place & 1:
                p.grad = None
                continue
            view = self._out_views[index] if scale == 1 else self._out_views[index] * scale
            p.grad = self._shown[index] = view if view.dtype == p.dtype else view.to(p.dtype)

    def take(self, outs: list[torch.Tensor]) -> None:
        """Take over the sums of a step that came from a peer, by bucket."""
        for mine, theirs in zip(self.outs, outs, strict=True):
            mine.copy_(theirs)

    def settle_buffers(self, applies: bool) -> None:
        """Running statistics: what they were, and the weighted mean of all members' changes if the step applies.

        ``b + sum_i w_i (b_i - b) / sum_i w_i``; whole numbers are rounded.
        """
        if not self._buffers:
            return
        place, live = 0, self._live_buffers()
        before, self._before = self._before or live, []
        with torch.no_grad():
            for bucket in self.layout.buckets[len(self._gradient_buckets) :]:
                for segment in bucket.segments:
                    buffer, old = live[place], before[place]
                    change = self.outs[bucket.index][segment.offset : segment.stop].view(segment.shape).to(old.device)
                    if not applies:
                        buffer.copy_(old)
                    elif old.is_floating_point():
                        buffer.copy_(torch.where(change == 0, old, old.to(change.dtype) + change))
                    elif old.dtype == torch.bool:
                        buffer.copy_((old.to(change.dtype) + change).round())
                    else:
                        buffer.copy_(old + change.round().to(old.dtype))
                    place += 1

    def _check_zeroed(self) -> None:
        """Refuse a backward pass that adds to the last step's gradients."""
        if any(p.grad is shown for p, shown in zip(self._params, self._shown, strict=True) if shown is not None):
            raise LoopOrderError(
                "backward() ran without optimizer.zero_grad() since the last step, so it would add to the old "
                "gradients: call optimizer.zero_grad() before backward()."
            )

    def clear(self) -> None:
        """Forget all gradients, and the step that was open."""
        self._before = []
        for p in self._params:
            p.grad = None

    def nonfinite_parameters(self) -> list[str]:
        """Names of the parameters whose local gradient is not finite."""
        return [
            self._name(i) for i, target in enumerate(self._targets)
            if self._touched[i] and not all(is_finite(view) for _, _, view in target)
        ]  # fmt: skip

    def _name(self, index: int) -> str:
        bucket, place = self._slots[index]
        return self.layout.buckets[bucket].segments[place].name
