"""What a worker's codec remembers from step to step (error feedback and the like), and what of it a step that comes to
nothing takes back.

For every bucket there are two states: the *kept* one, which encoding reads, and the *next* one, which it writes. A
commit makes the next one the kept one. A step that is done again starts from the kept one again, and so does the step
after one whose update was skipped: what was sent then was used by nobody.

State belongs to a worker and its gradients: it is cut by parameter name where it leaves this class. A worker that heals
begins with none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from raytrain_het.collectives.layout import Bucket, Layout
from raytrain_het.compression import Codec, State


class CodecStates:
    """Of one worker.

    Args:
        layout: the buckets. Those of buffers are always dense, and have no state.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._codec: Codec | None = None
        self._device = torch.device("cpu")
        self._kept: list[State] = [{} for _ in layout.buckets]
        self._next: list[State] = [{} for _ in layout.buckets]
        self._written: int | None = None
        """The step whose payloads the next state belongs to."""

    def use(self, codec: Codec, device: torch.device) -> None:
        """From now on gradients are encoded by this codec, on this device; another one than before begins anew."""
        if codec is not self._codec or device != self._device:
            self._codec, self._device = codec, device
            self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._kept, self._next = self._initial(), self._initial()
        self._written = None

    def begin(self) -> None:
        """A step is tried, perhaps again: nothing of it is written yet."""
        self._written = None

    def of_shard(self, bucket: Bucket, start: int, stop: int, step: int) -> tuple[State, State]:
        """The states that encoding elements ``start`` to ``stop`` of a bucket in this step reads and writes."""
        self._written = step
        kept, following = (
            {name: values[start:stop] for name, values in states[bucket.index].items()}
            for states in (self._kept, self._next)
        )
        return kept, following

    def commit(self, step: int) -> None:
        """The step is committed, with an update. Nothing happens if this worker has sent no gradient for it."""
        if self._written == step:
            self._kept, self._next, self._written = self._next, self._kept, None

    def by_parameter(self) -> dict[str, State]:
        """Copies on the CPU, for a checkpoint: a parameter's elements (numel, ...) flat, by name."""
        found: dict[str, State] = {}
        for bucket, state in zip(self._layout.buckets, self._kept, strict=True):
            for segment in bucket.segments if state else ():
                found[segment.name] = {
                    name: values[segment.offset : segment.stop].to("cpu", copy=True) for name, values in state.items()
                }
        return found

    def load(self, by_parameter: Mapping[str, State]) -> None:
        """The inverse of :meth:`by_parameter`. What is not there, as after a change of the codec, begins anew."""
        self.reset()
        for bucket, state in zip(self._layout.buckets, self._kept, strict=True):
            for segment in bucket.segments:
                for name, values in by_parameter.get(segment.name, {}).items():
                    if name in state:
                        state[name][segment.offset : segment.stop].copy_(values)

    def _initial(self) -> list[State]:
        codec = self._codec
        return [
            codec.init(b.numel, b.dtype, self._device) if codec is not None and not b.is_state else {}
            for b in self._layout.buckets
        ]
