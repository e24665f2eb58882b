"""This worker's weighted gradients of one step, by bucket: hooks fill them, and full ones are handed over."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from raytrain_het.allreduce.jobs import LocalBucket, SendBuffers
from raytrain_het.allreduce.layout import Layout, is_finite
from raytrain_het.allreduce.reducers import SendBuffer


class Buckets:
    """Used by the training thread. A bucket that was taken is the communication thread's until the step is over.

    Parameters are counted in the order of the buckets.

    Args:
        layout: which tensor is where.
        parameters: by name.
    """

    def __init__(self, layout: Layout, parameters: Mapping[str, nn.Parameter]) -> None:
        self.layout = layout
        self.params: list[nn.Parameter] = []
        self.places: list[tuple[int, int]] = []
        """By parameter: its bucket, and which tensor of it it is."""
        self.locals: list[torch.Tensor] = []
        """By bucket (n,): where what cannot be gathered in a message is, and state."""
        self._num_gradients = sum(not b.is_state for b in layout.buckets)
        for bucket in layout.buckets:
            on = torch.device("cpu") if bucket.is_state else parameters[bucket.segments[0].name].device
            # Not zeroed: a bucket that is gathered in its message leaves these pages untouched.
            self.locals.append(torch.empty(bucket.numel, dtype=bucket.dtype, device=on))
            for place, segment in enumerate(bucket.segments if not bucket.is_state else ()):
                self.places.append((bucket.index, place))
                self.params.append(parameters[segment.name])
        self._parts: list[list[SendBuffer]] = []
        """By bucket: the places in which it is gathered."""
        self._targets: list[list[SendBuffer]] = []
        """By parameter: the same, cut to the parameter; one place of its shape, or several flat ones."""
        self._send_buffers: SendBuffers | None = None
        self._gather_in(None)
        self.begin(None)

    def name(self, index: int) -> str:
        """The parameter's."""
        bucket, place = self.places[index]
        return self.layout.buckets[bucket].segments[place].name

    # ---------------------------------------------------------------- a step

    def begin(self, send_buffers: SendBuffers | None) -> None:
        """A step is opened: nothing is gathered yet.

        Args:
            send_buffers: where gradients are gathered, as far as they can be; else in buckets of their own.
        """
        if send_buffers is not self._send_buffers:
            self._gather_in(send_buffers)
        self._touched = [False] * len(self.params)
        self._used = [0] * len(self.layout.buckets)
        self._missing = [len(b.segments) for b in self.layout.buckets]
        """By bucket: tensors that are not complete."""
        self._complete: set[int] = set()
        self._num_full = self._num_taken = 0

    def _gather_in(self, send_buffers: SendBuffers | None) -> None:
        self._send_buffers = send_buffers
        self._parts, self._targets = [], []
        for bucket, local in zip(self.layout.buckets, self.locals, strict=True):
            there = send_buffers[bucket.index] if send_buffers is not None and local.device.type == "cpu" else None
            self._parts.append(there or [(0, bucket.numel, local)])
        for index, place in self.places:
            segment = self.layout.buckets[index].segments[place]
            target: list[SendBuffer] = []
            for start, stop, values in self._parts[index]:
                low, high = max(start, segment.offset), min(stop, segment.stop)
                if low < high:
                    target.append((low - segment.offset, high - segment.offset, values[low - start : high - start]))
            if len(target) == 1:
                target = [(0, segment.numel, target[0][2].view(segment.shape))]
            self._targets.append(target)

    def add(self, index: int, grad: torch.Tensor, weight: float) -> None:
        """Add a gradient of a parameter, times its weight."""
        target = self._targets[index]
        if len(target) > 1:
            grad = grad.reshape(-1)
        for start, stop, view in target:
            part = grad if len(target) == 1 else grad[start:stop]
            if self._touched[index]:
                view.add_(part, alpha=weight)
            elif part.dtype == view.dtype:
                torch.mul(part, weight, out=view)
            else:
                view.copy_(part).mul_(weight)
        self._touched[index] = True

    def complete(self, index: int) -> None:
        """The last pass has brought what there is of this parameter; nothing counts as zero."""
        bucket, place = self.places[index]
        if index not in self._complete:
            self._complete.add(index)
            self._missing[bucket] -= 1
        if self._touched[index]:
            self._used[bucket] |= 1 << place
        else:
            for _, _, view in self._targets[index]:
                view.zero_()

    def complete_rest(self) -> None:
        """The last pass is over."""
        for index in range(len(self.params)):
            if index not in self._complete:
                self.complete(index)

    # ---------------------------------------------------------------- full buckets

    def is_full(self, index: int) -> bool:
        """Whether the parameter's bucket is full, and may have been taken."""
        return self.places[index][0] < self._num_full

    def take_full(self, *, contributes: bool) -> list[LocalBucket]:
        """Those that are full and were not taken, in the launch order.

        Args:
            contributes: whether any of them counts.
        """
        while self._num_full < self._num_gradients and self._missing[self._num_full] == 0:
            self._num_full += 1
        return self._take(self._num_full, contributes)

    def take_all(self, *, contributes: bool) -> list[LocalBucket]:
        """All that were not taken, state included."""
        return self._take(len(self.layout.buckets), contributes)

    def _take(self, count: int, contributes: bool) -> list[LocalBucket]:
        taken = range(self._num_taken, count)
        self._num_taken = max(self._num_taken, count)
        return [self._bucket(k, looked_at=contributes and k < self._num_gradients) for k in taken]

    def _bucket(self, k: int, *, looked_at: bool) -> LocalBucket:
        parts, local = self._parts[k], self.locals[k]
        finite = not looked_at or all(is_finite(values) for _, _, values in parts)
        return LocalBucket(local if parts[0][2] is local else None, finite, self._used[k])

    def nonfinite_parameters(self) -> list[str]:
        """Names of the parameters whose local gradient is not finite."""
        return [
            self.name(i)
            for i, target in enumerate(self._targets)
            if self._touched[i] and not all(is_finite(view) for _, _, view in target)
        ]
