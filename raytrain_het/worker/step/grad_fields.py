"""``p.grad``: what stands there before a pass, between passes, and after a step's all-reduce.

A step's mean becomes ``p.grad``, added to what the user had left there, as autograd would add it. It is the user's
then: nobody else writes there any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.step_summary import StepSummary


class GradFields:
    """Those of a model's parameters, in the order of the buckets. Used by the training thread.

    Args:
        layout: which tensor is where.
        params: whose.
        places: by parameter: its bucket, and which tensor of it it is.
    """

    def __init__(self, layout: Layout, params: Sequence[nn.Parameter], places: Sequence[tuple[int, int]]) -> None:
        self.means: list[torch.Tensor] = []
        """By bucket: where the step's mean goes (n,). The user gets them as gradients, so each step has new ones."""
        self._layout, self._params, self._places = layout, params, places
        self._found: list[torch.Tensor | None] = []
        """What was in ``p.grad`` before the pass."""
        self._left: list[torch.Tensor | None] = [None] * len(params)
        """What was there before the step: the mean is added to it."""
        self._stands_in = False
        """Whether zeros stand there, between the passes of a step or until it is done again. What the loop's body does
        to them it does to no gradient."""

    # ---------------------------------------------------------------- a pass

    def set_aside(self) -> None:
        """A pass begins: what is there is the user's."""
        self._found = [p.grad for p in self._params]
        if not self._stands_in:
            self._left = self._found
        for p in self._params:
            p.grad = None

    def put_back(self) -> None:
        """It was a pass through other models."""
        for p, found in zip(self._params, self._found, strict=True):
            p.grad = found

    def first_that_is_not_zero(self, among: Sequence[bool]) -> int | None:
        """The first parameter that the user has left a gradient at, of those that must have none."""
        for index, left in enumerate(self._left):
            if left is not None and among[index] and bool(left.any()):
                return index
        return None

    def stand_in(self) -> None:
        """Zeros, so that clipping or a loss scaler in the loop's body finds what it expects."""
        for p in self._params:
            p.grad = torch.zeros_like(p, memory_format=torch.preserve_format)
        self._found, self._stands_in = [], True

    def clear(self) -> None:
        """Forget all gradients."""
        self._found, self._left, self._stands_in = [], [None] * len(self._params), False
        for p in self._params:
            p.grad = None

    # ---------------------------------------------------------------- a step's means

    def make_places(self, like: Sequence[torch.Tensor]) -> None:
        """New places for a step's means; those of the step before where nobody holds a part of them any more, since new
        memory has to be faulted in."""
        before: Sequence[torch.Tensor | None] = self.means or [None] * len(like)
        self.means = [
            old if old is not None and _is_ours_alone(old) else torch.empty_like(one)
            for old, one in zip(before, like, strict=True)
        ]

    def publish(
        self, summary: StepSummary, *, scale: float, has_hooks: Callable[[int], bool]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Make every ``p.grad`` its mean, times the loss's scale, which a scaler will take off again.

        None where nobody had a gradient. Where some worker's was not finite, all are NaN: a codec may send an overflow
        as something finite, and every loss scaler has to see it.

        Args:
            summary: what members say of the step.
            scale: by which the loss was multiplied here.
            has_hooks: whether the user has hooks on a parameter.

        Returns:
            (parameter, mean) of those that have hooks: they get theirs through autograd.
        """
        hooked: list[tuple[torch.Tensor, torch.Tensor]] = []
        means = [m.split([s.numel for s in b.segments]) for b, m in zip(self._layout.buckets, self.means, strict=False)]
        for index, (bucket, place) in enumerate(self._places):
            p, left = self._params[index], self._left[index]
            if not summary.used[bucket] >> place & 1:
                p.grad = left
                continue
            mean = means[bucket][place].view(p.shape).data  # No view: it may be detached in place.
            if not summary.finite:
                mean.fill_(torch.nan)
            elif scale != 1:
                mean.mul_(scale)
            if mean.dtype != p.dtype or mean.stride() != p.stride():
                mean = torch.empty_like(p, memory_format=torch.preserve_format).copy_(mean)
            if has_hooks(index):
                p.grad = left
                hooked.append((p, mean))
            else:
                p.grad = mean if left is None else left.add_(mean)
        self._found, self._left, self._stands_in = [], [None] * len(self._params), False
        return hooked

    def by_parameter(self, *, scale: float) -> dict[str, torch.Tensor]:
        """By parameter: the mean of all workers' gradients in this step, times the loss's scale."""
        gradients = [(b, m) for b, m in zip(self._layout.buckets, self.means, strict=True) if not b.is_state]
        return {s.name: m[s.offset : s.stop].view(s.shape) * scale for b, m in gradients for s in b.segments}


def _is_ours_alone(t: torch.Tensor) -> bool:
    """Whether no other tensor has this one's memory."""
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata) <= _ONE_HOLDER


_ONE_HOLDER = torch._C._storage_Use_Count((_alone := torch.empty(1)).untyped_storage()._cdata)
"""What torch counts for a tensor whose memory is its own: the tensor, and who asks."""
del _alone
