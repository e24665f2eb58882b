"""Copies of tensors that lie in memory as the original does.

``clone()`` and ``contiguous()`` keep values. A fused optimizer reads a parameter, its gradient and its state in the
order of memory, so those must also agree in strides. A tensor that was expanded takes as much memory after a copy as
before.
"""

from __future__ import annotations

import torch


def span(size: torch.Size | tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one that a tensor of this size and these strides reaches."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


def is_plain(t: torch.Tensor) -> bool:
    """Whether a tensor is elements in memory, and nothing else."""
    return (
        type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.layout is torch.strided
        and not (t.is_quantized or t.is_nested or t.is_conj() or t.is_neg() or t.device.type == "meta")
    )


def memory(t: torch.Tensor) -> torch.Tensor | None:
    """The memory of a plain tensor as a flat one that shares it. None where other elements lie in between."""
    num = span(t.shape, t.stride())
    if num > t.numel():
        return None
    return t.detach().as_strided((num,), (1,), t.storage_offset())


def overlaps(t: torch.Tensor) -> bool:
    """Whether two elements share memory, as after ``expand``: torch writes into no such tensor."""
    return is_plain(t) and span(t.shape, t.stride()) < t.numel()


def copy(t: torch.Tensor, device: str | torch.device | None = None) -> torch.Tensor:
    """A copy, detached, with the strides of the original. One with gaps in its memory comes back without them."""
    t = t.detach()
    to = t.device if device is None else device
    if is_plain(t) and not t.is_contiguous():
        flat = memory(t)
        if flat is not None:
            return flat.to(to, copy=True).as_strided(t.shape, t.stride())
    return t.to(to, copy=True)


def on_cpu(t: torch.Tensor) -> torch.Tensor:
    """The tensor, detached, on the CPU: itself if it is there."""
    return t.detach() if t.device.type == "cpu" and type(t) is torch.Tensor else copy(t, "cpu")


def aligned(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``value``, if need be as a copy, with the strides of a tensor of its shape."""
    if value.shape != like.shape or not (is_plain(value) and is_plain(like)) or value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def put(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Copy values into a tensor whose elements may share memory. False where the values do not fit into it."""
    if not overlaps(target):
        target.copy_(source)
        return True
    first = tuple(slice(0, 1) if s == 0 else slice(None) for s in target.stride())
    if overlaps(target[first]) or not torch.equal(source[first].expand(source.shape), source):
        return False
    target[first].copy_(source[first])
    return True
