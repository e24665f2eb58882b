"""What a worker's codec remembers from step to step (error feedback and the like), and what of it a step that comes to
nothing takes back.

For every bucket there are two states: the *kept* one, which encoding reads, and the *next* one, which it writes. A
commit makes the next one the kept one. A step that is done again starts from the kept one again, and so does the step
after one whose update was skipped: what was sent then was used by nobody.

One state serves both halves of the all-reduce: of the elements that a worker does not own it remembers what it left out
of what it sent, of those that it owns what it left out of their mean. So whoever owns an element next takes nothing
over: what the last owner still has of it goes the way of all gradients.

What a worker that leaves has left out is added to the kept state of another one, between two steps.

A codec that remembers nothing sends what the one before it has left out along with its first gradients.

State belongs to a worker and its gradients: it is cut by parameter name where it leaves this class. A worker that heals
begins with none.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from raytrain_het.allreduce.codecs import RESIDUAL, Codec, State
from raytrain_het.allreduce.layout import Bucket, Layout

_RISE = 0.02
"""So much more weight a sample is expected at most from one step to the next."""
_ROUNDING = 1e-9
_NOTHING = 1e-6
"""So small a part of what was to be sent along is nothing."""


class CodecStates:
    """Of one worker.

    Args:
        layout: the buckets. Dense ones have no state.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._codec: Codec | None = None
        self._wanted: tuple[Codec, torch.device] | None = None
        self._device = torch.device("cpu")
        self._kept: list[State] = [{} for _ in layout.buckets]
        self._next: list[State] = [{} for _ in layout.buckets]
        self._written: int | None = None
        """The step whose payloads the next state belongs to."""
        self._left: dict[int, torch.Tensor] = {}
        """By bucket: what an earlier codec has left out, and this one, which remembers nothing, sends along."""
        self._flushed: set[int] = set()
        """Buckets with which it was sent in the step that is under way."""
        self._inherited: collections.deque[Mapping[str, State]] = collections.deque()
        """What others had left out, from the next step on this worker's."""
        self._much: dict[int, float] = {}
        """By bucket: the largest of what there was to send along."""
        self.weight_per_sample: float | None = None
        """Of the last steps the least, about; None before the first one."""
        self._expected: list[float | None] = [None] * len(layout.buckets)
        """By bucket: the sum of weights that what was sent was made for; None where sums are not divided."""
        self._owned: list[tuple[int, int]] = [(0, 0)] * len(layout.buckets)
        """By bucket: the elements of which means are remembered, and not what was sent."""

    def use(self, codec: Codec, device: torch.device) -> None:
        """From the next step on gradients are encoded by this codec, on this device: the last one may yet be committed.

        What another one before has left out, this one sends.
        """
        self._wanted = codec, device
        if self._codec is None:
            self._change()

    def _change(self) -> None:
        if self._wanted is None or self._wanted == (self._codec, self._device):
            return
        before = self._by_parameter()
        self._codec, self._device = self._wanted
        self._load(before)

    def reset(self) -> None:
        """Begin anew."""
        self._inherited.clear()
        self._reset()

    def _reset(self) -> None:
        self._kept, self._next = self._initial(), self._initial()
        self._written, self._left, self._flushed, self._much = None, {}, set(), {}

    def begin(self) -> None:
        """A step is tried, perhaps again: nothing of it is written yet."""
        self._change()
        self._written, self._flushed = None, set()
        while self._inherited:
            self.adopt(self._inherited.popleft())

    def inherit(self, by_parameter: Mapping[str, State]) -> float:
        """As :meth:`adopt`, from any thread: when the next step begins. Returns the norm of what is left out there."""
        self._inherited.append(by_parameter)
        return _norm(state[RESIDUAL] for state in by_parameter.values() if RESIDUAL in state)

    def norm(self) -> float | None:
        """About ``|r|`` of all that is left out, while steps go on; None for a codec that leaves nothing."""
        held = [state[RESIDUAL] for state in self._kept if RESIDUAL in state]
        return _norm([*held, *self._left.values()]) if held or self._left else None

    @property
    def flushes(self) -> bool:
        """Whether something is to be sent along by :meth:`flush`."""
        return bool(self._left)

    def flush(self, bucket: Bucket, local: torch.Tensor, weight: float) -> None:
        """Add to a gradient (n,), which is about to be sent, what an earlier codec has left out of it."""
        left = self._left.get(bucket.index)
        if left is not None:
            local.add_(left.to(local), alpha=weight)
            self._flushed.add(bucket.index)

    def of_shard(self, bucket: Bucket, start: int, stop: int, step: int) -> tuple[State, State]:
        """The states that encoding elements ``start`` to ``stop`` of a bucket in this step reads and writes."""
        self._written = step
        kept, following = (
            {name: values[start:stop] for name, values in states[bucket.index].items()}
            for states in (self._kept, self._next)
        )
        return kept, following

    def carry(self, bucket: Bucket, start: int, stop: int, step: int) -> None:
        """Nothing is encoded of these elements in this step: what is remembered of them stays."""
        for kept, following in zip(*(s.values() for s in self.of_shard(bucket, start, stop, step)), strict=True):
            following.copy_(kept)

    def expected_weight(self, num_samples: int) -> float:
        """The sum of weights of a step of so many samples: that of the last steps, rather too small than too large.

        ``E > 2 W`` would send so much of a residual that more than it is left, with the other sign.
        """
        return (self.weight_per_sample or 1.0) * num_samples

    def saw_weight(self, total_weight: float, num_samples: int) -> None:
        """What it was in fact."""
        if total_weight > 0 and num_samples > 0:
            seen = total_weight / num_samples
            self.weight_per_sample = min(seen, (1 + _RISE) * (self.weight_per_sample or seen))

    def encodes(self, bucket: Bucket, owned: tuple[int, int], expected_weight: float | None) -> None:
        """A bucket is about to be encoded, for this weight; None where sums are not divided. Of the elements ``owned``
        the mean is."""
        self._expected[bucket.index], self._owned[bucket.index] = expected_weight, owned

    def commit(self, step: int, total_weight: float, used: Sequence[int]) -> None:
        """The step is committed, with an update. Nothing happens if this worker has encoded nothing for it.

        What was sent was made for an expected weight ``E``, and divided by another, ``W``: of a residual ``r`` the part
        ``E/W r`` has gone into the mean then, and what was left out of that is ``E/W r'``. So ``E/W r' + (1 - E/W) r``
        is kept. Of a parameter that nobody used nothing was applied, and everything is kept.

        Args:
            step: which one.
            total_weight: the sum of weights ``W``.
            used: by bucket: bit ``k`` is set if anybody used its tensor ``k``.
        """
        if self._flushed:
            self._commit_flushed(total_weight, used)
        if self._written != step:
            return
        for bucket, kept, following in zip(self._layout.buckets, self._kept, self._next, strict=True):
            if RESIDUAL not in following:
                continue
            before, after = kept[RESIDUAL], following[RESIDUAL]
            expected, (start, stop) = self._expected[bucket.index], self._owned[bucket.index]
            if expected is not None and abs(expected / total_weight - 1) > _ROUNDING:
                for part in (slice(0, start), slice(stop, bucket.numel)):
                    torch.lerp(before[part], after[part], expected / total_weight, out=after[part])
            for k, segment in enumerate(bucket.segments):
                if not used[bucket.index] >> k & 1:
                    after[segment.offset : segment.stop].copy_(before[segment.offset : segment.stop])
        self._kept, self._next, self._written = self._next, self._kept, None

    def _commit_flushed(self, total_weight: float, used: Sequence[int]) -> None:
        for index in self._flushed:
            expected = self._expected[index]
            factor = 1 - expected / total_weight if expected is not None else 0.0
            for k, segment in enumerate(self._layout.buckets[index].segments):
                if used[index] >> k & 1:
                    self._left[index][segment.offset : segment.stop].mul_(factor)
            if float(self._left[index].abs().max()) <= _NOTHING * self._much[index]:
                del self._left[index], self._much[index]
        self._flushed = set()

    def by_parameter(self) -> dict[str, State]:
        """Copies on the CPU, for a checkpoint: a parameter's elements (numel, ...) flat, by name."""
        found = self._by_parameter()
        for inherited in list(self._inherited):
            for name, state in inherited.items():
                known = found.setdefault(name, {})
                known[RESIDUAL] = known[RESIDUAL] + state[RESIDUAL] if RESIDUAL in known else state[RESIDUAL]
        return found

    def _by_parameter(self) -> dict[str, State]:
        found: dict[str, State] = {}
        for bucket, kept in zip(self._layout.buckets, self._kept, strict=True):
            state = kept | ({RESIDUAL: self._left[bucket.index]} if bucket.index in self._left else {})
            for segment in bucket.segments if state else ():
                found[segment.name] = {
                    name: values[segment.offset : segment.stop].to("cpu", copy=True) for name, values in state.items()
                }
        return found

    def load(self, by_parameter: Mapping[str, State]) -> None:
        """The inverse of :meth:`by_parameter`. What is not there, as after a change of the codec, begins anew; what
        was left out is sent by any."""
        self._inherited.clear()
        self._load(by_parameter)

    def _load(self, by_parameter: Mapping[str, State]) -> None:
        self._reset()
        for bucket, state in zip(self._layout.buckets, self._kept, strict=True):
            for segment in bucket.segments:
                for name, values in by_parameter.get(segment.name, {}).items():
                    if name in state and name != RESIDUAL and len(values) == segment.numel:
                        state[name][segment.offset : segment.stop].copy_(values)
        self.adopt(by_parameter)

    def adopt(self, by_parameter: Mapping[str, State]) -> None:
        """What a worker has left out that is not there any more: this one sends it, too."""
        for bucket, state in zip(self._layout.buckets, self._kept, strict=True):
            for segment in bucket.segments if not bucket.is_dense else ():
                left_out = by_parameter.get(segment.name, {}).get(RESIDUAL)
                if left_out is None or len(left_out) != segment.numel or not left_out.any():
                    continue
                if RESIDUAL not in state and bucket.index not in self._left:
                    self._left[bucket.index] = torch.zeros(bucket.numel, dtype=bucket.dtype, device=self._device)
                held = state[RESIDUAL] if RESIDUAL in state else self._left[bucket.index]
                held[segment.offset : segment.stop].add_(left_out.to(self._device))
        self._much = {index: float(left.abs().max()) for index, left in self._left.items()}

    def _initial(self) -> list[State]:
        codec = self._codec
        return [
            codec.init(b.numel, b.dtype, self._device) if codec is not None and not b.is_dense else {}
            for b in self._layout.buckets
        ]


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(t)) ** 2 for t in tensors))
