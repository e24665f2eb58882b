"""How many samples fit into a GPU's memory at once: found by trying, from below.

A bound on one pass is all there is: a share that does not fit is cut into passes that do, so shares need no bound.
"""

from __future__ import annotations

from typing import Protocol

import torch

PART = 0.9
"""So much of what is free may be used: allocators and kernels need room of their own."""
FIRST = 2
"""Samples of the very first pass, and of the smallest: a batch norm of one sample raises."""
MOST_GROWTH = 4
"""The next pass is at most so many times as large as the largest that was measured."""


class Meter(Protocol):
    """What a device knows of its memory, in bytes."""

    def reset(self) -> int:
        """The peak starts anew; returns what is in use now."""

    def peak_bytes(self) -> int:
        """Most that was in use at once since the last reset."""

    def total_bytes(self) -> int:
        """What this process has, and what is free."""


class CudaMeter:
    """Torch's allocator on one GPU; what other processes hold there is not counted as free."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        return int(torch.cuda.memory_allocated(self._device))

    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated(self._device))

    def total_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free + torch.cuda.memory_reserved(self._device))


class MemoryLimit:
    """Most samples for one forward and backward pass.

    A pass over ``b`` samples needs ``m(b) = m_0 + m_1 b`` bytes, of which ``a <= m_0`` are in use before its step
    (parameters, the optimizer's state). So what comes on top grows at most in proportion: a pass that took ``m - a``
    says that ``b (M - a) / (m - a)`` samples fit into ``M``, with the ``a`` of the step at hand: the first one has no
    optimizer state yet. The first pass is of ``FIRST`` samples, each next one, also within a step, of at most
    ``MOST_GROWTH`` times as many as were measured.

    Args:
        meter: the device's; None where memory is not watched (CPU).
    """

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._in_use = 0
        self._measured: tuple[int, int] | None = None
        """Samples of a pass, and the bytes that it took."""

    @classmethod
    def of(cls, device: torch.device) -> MemoryLimit:
        """The limit of a device."""
        return cls(CudaMeter(device) if device.type == "cuda" else None)

    @property
    def samples(self) -> int | None:
        """Most samples for the next pass; None is no limit."""
        if self._meter is None:
            return None
        if self._measured is None:
            return FIRST
        samples, taken = self._measured
        return max(FIRST, int(samples * min(self._room(self._meter, taken), MOST_GROWTH)))

    def step_begins(self) -> None:
        """What is measured from here on belongs to the next step."""
        if self._meter is not None:
            self._in_use = self._meter.reset()

    def passed(self, samples: int) -> None:
        """The step's passes so far went through, or the whole step; the largest was of so many samples."""
        if self._meter is None:
            return
        taken = max(self._meter.peak_bytes() - self._in_use, 1)
        # A small last batch of an epoch says little; one that took too much says all.
        if self._measured is None or samples >= self._measured[0] or self._room(self._meter, taken) < 1:
            self._measured = samples, taken

    def _room(self, meter: Meter, taken: int) -> float:
        """How many times as much would fit."""
        return (PART * meter.total_bytes() - self._in_use) / taken
