"""Elements chosen by chance, the same ones on all workers: ``randomk``."""

from __future__ import annotations

import dataclasses

import torch

from raytrain_het.allreduce.codecs.base import Stamp
from raytrain_het.allreduce.codecs.packed import Feedback, PackedCodec
from raytrain_het.allreduce.codecs.warmup import warm_densities
from raytrain_het.codec_options import SparseOptions


class RandomK(PackedCodec):
    """``decoded_i = y_i`` for one element ``i`` of every ``g = round(1 / density)``, and 0 for the others.

    Which one is a hash of the shared key and the place, so all workers send the same elements of a step. No places
    travel, and the mean of what was sent is sent back as it is.

    Body: ``ceil(n / g)`` fp32.

    Bias: what is not chosen becomes 0.
    Error feedback: always on.
    Source: Sparsified SGD with Memory (Stich et al. 2018, arXiv:1809.07599).

    Args:
        options: see :class:`raytrain_het.codec_options.SparseOptions`.
    """

    name = "randomk"
    biased = True
    error_feedback = True

    def __init__(self, options: SparseOptions) -> None:
        super().__init__(options)
        self.density: float = options.density
        self._warming = [
            RandomK(dataclasses.replace(options, density=density, warmup_epochs=0))
            for density in warm_densities(options.density, options.warmup_epochs)
        ]
        self.group = max(1, round(1 / self.density))

    def at_epoch(self, epoch: int) -> RandomK:
        return self._warming[epoch] if epoch < len(self._warming) else self

    def body_bytes(self, num_elements: int) -> int:
        return 4 * -(-num_elements // self.group)

    def places(self, num_elements: int, shared_key: int, device: torch.device) -> torch.Tensor:
        """(ceil(n / g),) places in order."""
        h = torch.arange(-(-num_elements // self.group), device=device)
        first = h * self.group
        h.mul_(0x9E3779B1).add_(shared_key).bitwise_and_(_WORD)
        h = (h ^ h >> 16).mul_(0x45D9F3B).bitwise_and_(_WORD)
        h = (h ^ h >> 13).mul_(0x45D9F3B).bitwise_and_(_WORD)
        return first + (h ^ h >> 16) % (num_elements - first).clamp_(max=self.group)

    def pack(self, x: torch.Tensor, body: torch.Tensor, stamp: Stamp, feedback: Feedback | None) -> int:
        places = self.places(x.numel(), stamp.shared_key, x.device)
        size = 4 * places.numel()
        kept = x[places]
        if feedback is not None:
            kept.add_(feedback.residual[places], alpha=feedback.weight)
            torch.add(feedback.residual, x, alpha=1 / feedback.weight, out=feedback.following)
            feedback.following[places] = 0.0
        body[:size].view(torch.float32).copy_(kept)
        return size

    def unpack(self, body: torch.Tensor, shared_key: int, out: torch.Tensor) -> None:
        out.zero_()
        out[self.places(out.numel(), shared_key, out.device)] = body.view(torch.float32)


_WORD = 2**32 - 1
