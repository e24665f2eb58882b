"""What a worker's codec remembers from step to step: the residual of error feedback, and other state by element.

Each bucket has two states: encoding reads the *kept* one and writes the *next* one. A commit makes the next state the
kept one. A step that is done again starts from the kept state again, and so does the step after one whose update was
skipped: nobody used what was sent then.

One state serves both halves of an all-reduce. For elements that a worker does not own it holds what the worker left out
of its gradient; for those that it owns, what it left out of their mean. So a new owner takes nothing over: the residual
of the last owner is added to that worker's next gradient.

The residual of a worker that leaves is added to the kept state of another one, between two steps. If a codec keeps no
residual, that of the codec before it, the *earlier residual*, is added to the first gradients.

State belongs to a worker and its gradients. It leaves this class by parameter name. A worker that heals begins with
none.

*Threads.* The communication thread calls what belongs to a step's all-reduce; the training thread calls the rest,
between steps. Any thread may call :meth:`ErrorFeedback.inherit`.
"""

from __future__ import annotations

import collections
import math
import threading
from collections.abc import Iterable, Mapping, Sequence

import torch

from raytrain_het.allreduce.codecs import RESIDUAL, Codec, State
from raytrain_het.allreduce.layout import Bucket, Layout

_RISE = 0.02
"""The expected weight of a sample grows by at most this part from one step to the next."""
_ROUNDING = 1e-9
"""Two weights that differ by no more than this part are equal."""
_NOTHING = 1e-6
"""An earlier residual is spent once no more than this part of it is left."""


class ErrorFeedback:
    """One worker's state. It also keeps the weight of a sample, by which residuals are scaled before a step's weights
    are known.

    Args:
        layout: the buckets. Dense ones have no state.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.RLock()
        """A step may begin while the training thread reports in the loop's body."""
        self._codec: Codec | None = None
        self._wanted: tuple[Codec, torch.device] | None = None
        self._device = torch.device("cpu")
        self._kept: list[State] = [{} for _ in layout.buckets]
        self._next: list[State] = [{} for _ in layout.buckets]
        self._written: int | None = None
        """The step that the next state belongs to."""
        self._earlier: dict[int, torch.Tensor] = {}
        """By bucket: the earlier residual, where the codec keeps none of its own."""
        self._sent_earlier: set[int] = set()
        """Buckets to which it was added in the step that is under way."""
        self._largest_earlier: dict[int, float] = {}
        """By bucket: its largest element at first."""
        self._inherited: collections.deque[Mapping[str, State]] = collections.deque()
        """State of other workers, which is added to this worker's when the next step begins."""
        self.weight_per_sample: float | None = None
        """That of the last steps, rather too small than too large; None before the first one."""
        self._expected: list[float | None] = [None] * len(layout.buckets)
        """By bucket: the sum of weights for which it was encoded; None where sums are not divided."""
        self._owned: list[tuple[int, int]] = [(0, 0)] * len(layout.buckets)
        """By bucket: the elements whose state is that of their mean, and not of this worker's gradient."""

    def use_codec(self, codec: Codec, device: torch.device) -> None:
        """From the next step on gradients are encoded by this codec, on this device: the last step may yet be
        committed."""
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
        """Forget everything."""
        self._inherited.clear()
        self._reset()

    def forget_all_but_residual(self) -> None:
        """Begin anew with every other state, which all that encode have in common."""
        with self._lock:
            self._load({name: {RESIDUAL: s[RESIDUAL]} for name, s in self._by_parameter().items() if RESIDUAL in s})

    def _reset(self) -> None:
        self._kept, self._next = self._initial(), self._initial()
        self._written, self._earlier, self._sent_earlier, self._largest_earlier = None, {}, set(), {}

    def begin_step(self) -> None:
        """A step is tried, perhaps again: nothing of it is written yet."""
        with self._lock:
            self._change()
            self._written, self._sent_earlier = None, set()
            while self._inherited:
                self.adopt(self._inherited.popleft())

    def inherit(self, by_parameter: Mapping[str, State]) -> float:
        """:meth:`adopt` this state when the next step begins. From any thread.

        Returns:
            The norm of its residual.
        """
        self._inherited.append(by_parameter)
        return _norm(state[RESIDUAL] for state in by_parameter.values() if RESIDUAL in state)

    def norm(self) -> float | None:
        """The norm of the whole residual, about, while steps go on; None for a codec that keeps none."""
        with self._lock:
            held = [state[RESIDUAL] for state in self._kept if RESIDUAL in state]
            return _norm([*held, *self._earlier.values()]) if held or self._earlier else None

    @property
    def has_earlier_residual(self) -> bool:
        """Whether :meth:`add_earlier_residual` has something to add."""
        return bool(self._earlier)

    def add_earlier_residual(self, bucket: Bucket, local: torch.Tensor, weight: float) -> None:
        """Add to a gradient (n,), which is about to be sent, what an earlier codec has left out of it."""
        earlier = self._earlier.get(bucket.index)
        if earlier is not None:
            local.add_(earlier.to(local), alpha=weight)
            self._sent_earlier.add(bucket.index)

    def of_shard(self, bucket: Bucket, start: int, stop: int, step: int) -> tuple[State, State]:
        """The state that encoding elements ``start`` to ``stop`` of a bucket in this step reads, and the one that it
        writes."""
        self._written = step
        kept, following = (
            {name: values[start:stop] for name, values in states[bucket.index].items()}
            for states in (self._kept, self._next)
        )
        return kept, following

    def carry_over(self, bucket: Bucket, start: int, stop: int, step: int) -> None:
        """These elements are not encoded in this step: their state stays."""
        for kept, following in zip(*(s.values() for s in self.of_shard(bucket, start, stop, step)), strict=True):
            following.copy_(kept)

    def expected_weight(self, num_samples: int) -> float:
        """The sum of weights ``E`` of a step of so many samples, by the last steps; rather too small than too large.

        With ``E > 2 W``, ``W`` the real sum, so much of a residual would be sent that more than all of it is left, with
        the other sign.
        """
        return (self.weight_per_sample or 1.0) * num_samples

    def observe_weight(self, total_weight: float, num_samples: int) -> None:
        """The sum of weights that a step of so many samples had."""
        if total_weight > 0 and num_samples > 0:
            seen = total_weight / num_samples
            self.weight_per_sample = min(seen, (1 + _RISE) * (self.weight_per_sample or seen))

    def begin_bucket(self, bucket: Bucket, owned: tuple[int, int], expected_weight: float | None) -> None:
        """A bucket is about to be encoded.

        Args:
            bucket: which one.
            owned: (start, stop) of the elements whose mean this worker encodes.
            expected_weight: the sum of weights for which it is encoded; None where sums are not divided.
        """
        self._expected[bucket.index], self._owned[bucket.index] = expected_weight, owned

    def commit(self, step: int, total_weight: float, used: Sequence[int]) -> None:
        """The step is committed, with an update. Nothing happens if this worker has encoded nothing for it.

        A gradient is encoded for an expected weight ``E``, and the sum is divided by another one, ``W``. So of a
        residual ``r`` the part ``E/W r`` has gone into the mean, and ``E/W r'`` was left out of that:
        ``E/W r' + (1 - E/W) r`` is kept. A parameter that nobody used was not updated, and keeps its state.

        Args:
            step: which one.
            total_weight: the sum of weights ``W``.
            used: by bucket: bit ``k`` is set if anybody used its tensor ``k``.
        """
        if self._sent_earlier:
            self._commit_earlier(total_weight, used)
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

    def _commit_earlier(self, total_weight: float, used: Sequence[int]) -> None:
        for index in self._sent_earlier:
            expected = self._expected[index]
            factor = 1 - expected / total_weight if expected is not None else 0.0
            for k, segment in enumerate(self._layout.buckets[index].segments):
                if used[index] >> k & 1:
                    self._earlier[index][segment.offset : segment.stop].mul_(factor)
            if float(self._earlier[index].abs().max()) <= _NOTHING * self._largest_earlier[index]:
                del self._earlier[index], self._largest_earlier[index]
        self._sent_earlier = set()

    def by_parameter(self) -> dict[str, State]:
        """Copies on the CPU, for a checkpoint: a parameter's elements (numel, ...) flat, by name."""
        with self._lock:
            found = self._by_parameter()
            for inherited in list(self._inherited):
                for name, state in inherited.items():
                    known = found.setdefault(name, {})
                    known[RESIDUAL] = known[RESIDUAL] + state[RESIDUAL] if RESIDUAL in known else state[RESIDUAL]
            return found

    def _by_parameter(self) -> dict[str, State]:
        found: dict[str, State] = {}
        for bucket, kept in zip(self._layout.buckets, self._kept, strict=True):
            state = kept | ({RESIDUAL: self._earlier[bucket.index]} if bucket.index in self._earlier else {})
            for segment in bucket.segments if state else ():
                found[segment.name] = {
                    name: values[segment.offset : segment.stop].to("cpu", copy=True) for name, values in state.items()
                }
        return found

    def load(self, by_parameter: Mapping[str, State]) -> None:
        """The inverse of :meth:`by_parameter`. State that is missing, as after a change of the codec, begins anew. A
        residual is kept whatever the codec."""
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
        """Add the residual of a worker that has gone to this worker's."""
        for bucket, state in zip(self._layout.buckets, self._kept, strict=True):
            for segment in bucket.segments if not bucket.is_dense else ():
                residual = by_parameter.get(segment.name, {}).get(RESIDUAL)
                if residual is None or len(residual) != segment.numel or not residual.any():
                    continue
                if RESIDUAL not in state and bucket.index not in self._earlier:
                    self._earlier[bucket.index] = torch.zeros(bucket.numel, dtype=bucket.dtype, device=self._device)
                held = state[RESIDUAL] if RESIDUAL in state else self._earlier[bucket.index]
                held[segment.offset : segment.stop].add_(residual.to(self._device))
        self._largest_earlier = {index: float(earlier.abs().max()) for index, earlier in self._earlier.items()}

    def _initial(self) -> list[State]:
        codec = self._codec
        return [
            codec.init(b.numel, b.dtype, self._device) if codec is not None and not b.is_dense else {}
            for b in self._layout.buckets
        ]


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(t)) ** 2 for t in tensors))
