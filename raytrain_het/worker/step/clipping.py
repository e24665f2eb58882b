"""Clipping of the mean gradient, which is the same on all workers: so what follows is too."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clipping:
    """By the norm of all gradients together, ``g = g min(1, norm / |g|)``, or by value,
    ``g = max(-value, min(value, g))``.

    Norms are added up in fp64. Each worker's own gradient is left as it is: clipping that before it is added to the
    others' would bias the mean. (Pascanu et al. 2013.)
    """

    norm: float | None = None
    value: float | None = None

    def clip(self, parameters: Iterable[torch.Tensor], scale: float = 1.0) -> bool:
        """Change the parameters' gradients, which are ``scale`` times what they are, in place; returns whether there
        was anything to change."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        changed = False
        if self.value is not None:
            limit = self.value * scale
            for g in gradients:
                if float(g.abs().max() if g.numel() else 0.0) > limit:
                    g.clamp_(-limit, limit)
                    changed = True
        if self.norm is not None:
            total = math.sqrt(sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in gradients))
            if total > self.norm * scale:
                # Rounded: with other numbers of threads the last bits of a sum are others.
                factor = float(torch.tensor(self.norm * scale / total, dtype=torch.float32))
                for g in gradients:
                    g.mul_(factor)
                changed = True
        return changed
