"""Elements chosen by chance, the same ones by all workers: ``randomk``."""

from __future__ import annotations

import torch

from raytrain_het.allreduce.codecs.base import Feedback, PackedCodec, Stamp
from raytrain_het.allreduce.codecs.warmup import warm_densities


class RandomK(PackedCodec):
    """One element of every ``g = round(1 / density)``, in fp32; which one is a hash of the shared key and the place.

    All workers send the same elements of a step, so that no places travel and the mean of what was sent is sent back as
    it is. Error feedback is always on. (Stich et al. 2018.)

    Args:
        density: the kept fraction, above 0 and at most 1.
        warmup_epochs: in so many epochs more is kept, see :func:`~raytrain_het.allreduce.codecs.warmup.warm_densities`.
    """

    name = "randomk"
    biased = True
    error_feedback = True

    def __init__(self, *, density: float = 0.01, warmup_epochs: int = 0) -> None:
        self.density = density
        self._warming = [RandomK(density=warm) for warm in warm_densities(density, warmup_epochs)]
        self.group = max(1, round(1 / density))

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
