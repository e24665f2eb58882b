"""Shadows of tensors: what they would be with other samples of the same batch in their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from raytrain_het.worker.data.batches import with_tensors

SHADOWS = 3
OF_CHANGES = 1e-3
"""How much of what exchanges change is rounding."""


@dataclass(frozen=True)
class Shadow:
    """What a tensor would be with other samples."""

    values: tuple[torch.Tensor, ...]
    """With every second sample replaced; with the others; with all."""
    met: str = ""
    """The call in which samples came together, if they have."""


def shadows_of(batch: Any, samples: int) -> Any:
    """By tensor, of all that have a dimension of samples. Where others have none, as those of graphs and of texts that
    were put one after the other, whole numbers may be lengths and places in them: these stay."""
    tensors: list[torch.Tensor] = []
    with_tensors(batch, lambda t: tensors.append(t) or t)  # type: ignore[func-returns-value]
    dims = [[d for d, size in enumerate(t.shape) if size == samples] for t in tensors]
    if any(len(d) > 1 for d in dims):
        raise ValueError(f"tensors have several dimensions of {samples}: {[list(t.shape) for t in tensors]}")
    whole = all(dims)
    shadows: Any = WeakTensorKeyDictionary()
    for t, d in zip(tensors, dims, strict=True):
        if d and t.layout is torch.strided and (whole or t.is_floating_point()):
            orders = _orders(samples, t.device)
            shadows[t] = Shadow(tuple(t.detach().index_select(d[0], order) for order in orders))
    return shadows


def of_a_gradient(t: torch.Tensor, samples: int, is_of_a_mean: bool) -> tuple[torch.Tensor, ...]:
    """Shadows of what ``torch.autograd.grad()`` has computed, which are not known.

    A sample's gradient is exchanged with it; if it has the number of samples in it, what depends on its size is not
    additive. Nothing is that depends on the gradient of all samples' loss.
    """
    dims = [d for d, size in enumerate(t.shape) if size == samples]
    if len(dims) != 1:
        waves = torch.arange(t.numel(), device=t.device).sin().view(t.shape)
        return t.clone(), t.clone(), t * (1.5 + 0.5 * waves.to(t.dtype))
    first, second, both = (t.index_select(dims[0], order) for order in _orders(samples, t.device))
    return first, second, 2 * both if is_of_a_mean else both


def _orders(samples: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Every second sample is replaced by another one; the others are; all are."""
    place = torch.arange(samples, device=device)
    even = place % 2 == 0
    return torch.where(even, 1, place), torch.where(even, place, 0), torch.where(even, 1, 0)


def nth(shadows: Any, t: torch.Tensor, k: int) -> torch.Tensor:
    shadow = shadows.get(t)
    return t if shadow is None else shadow.values[k]


def come_together(t: torch.Tensor, others: tuple[torch.Tensor, ...]) -> bool:
    """Whether some of a tensor's elements are not additive in samples."""
    if not t.is_floating_point() or not t.numel():
        return False
    rounding = max(OF_CHANGES, 8 * torch.finfo(t.dtype).eps)
    now, first, second, both = (x.detach().double() for x in (t, *others))
    changes = max(float((first - now).abs().max()), float((second - now).abs().max()))
    return float((both - first - second + now).abs().max()) > rounding * changes > 0
