"""A job's training step without peers, at any batch size: `raytrain-het probe --model` measures it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raytrain_het.allreduce.codecs import codec_of
from raytrain_het.allreduce.layout import Layout
from raytrain_het.worker.data.batches import to_device
from raytrain_het.worker.data.data_plan import micro_batches
from raytrain_het.worker.data.fetch import SampleFetcher
from raytrain_het.worker.step.step_key import step_key


class TrainingStep:
    """A call with a number of samples does one whole step: fetch, forward, backward, update.

    Args:
        dataset: of pairs (input, target); samples are fetched as in a run, at random places.
        model: on ``device``.
        optimizer: of the model's parameters.
        loss_of: from the model's output and the target to a mean over samples.
        device: where it runs. A call returns when the device is done.
    """

    def __init__(
        self,
        dataset: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.dataset, self.model, self.optimizer = dataset, model, optimizer
        self.loss_of, self.device = loss_of, device
        self.micro_batch_size: int | None = None
        """Most samples in one pass; ``None`` is no limit."""
        self._fetcher = SampleFetcher(dataset)
        self._order, self._place = torch.randperm(len(dataset)), 0

    def __call__(self, samples: int) -> None:
        places = torch.arange(self._place, self._place + samples) % len(self._order)
        self._place = (self._place + samples) % len(self._order)
        self.optimizer.zero_grad()
        for part in micro_batches(range(samples), self.micro_batch_size):
            indices = self._order[places[part.start : part.stop]].tolist()
            x, y = to_device(self._fetcher.fetch(0, indices), self.device)
            (self.loss_of(self.model(x), y) * (len(part) / samples)).backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def key(self) -> str:
        """The key under which a run of this model looks up how long its steps take."""
        return step_key(self.model, len(self._order), self.micro_batch_size)

    @property
    def compressed_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the tensors that codecs compress."""
        return self._layout(small_apart=True).compressed_shapes

    def _layout(self, *, small_apart: bool) -> Layout:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return Layout(named, [], 1, small_apart=small_apart)

    def gradient_bytes(self, codec: str) -> int:
        """The bytes of a whole gradient in messages."""
        found = 0
        for bucket in self._layout(small_apart=codec_of(codec).spares_small).buckets:
            chosen, shapes = codec_of("none" if bucket.is_dense else codec), [s.shape for s in bucket.segments]
            found += chosen.gradient_bytes(shapes, bucket.dtype)
        return found
