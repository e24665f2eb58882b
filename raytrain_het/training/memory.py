"""How many samples fit into a GPU's memory at once: found by trying, without ever running out of it."""

from __future__ import annotations

import math
from typing import Protocol

import torch

PART = 0.9
"""So much of what is free may be used: allocators and kernels need room of their own."""
FIRST_PARTS = 8
"""The first step is cut into so many parts, so that even a batch far too large is measured and not fatal."""
MOST_GROWTH = 4
"""The next part is at most so many times as large as the largest that was measured."""


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

    A pass over ``b`` samples needs ``m(b) = m_0 + m_1 b`` bytes, of which ``a <= m_0`` are in use before it
    (parameters, the optimizer's state). So what comes on top grows at most in proportion: a pass measured at ``m``
    bytes says that ``b (M - a) / (m - a)`` samples fit into ``M``. The first pass is a small one, each next one at most
    ``MOST_GROWTH`` times as large, until the share is done in one.

    Args:
        meter: the device's; None where memory is not watched (CPU).
    """

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._safe: int | None = None
        self._in_use = 0

    @classmethod
    def of(cls, device: torch.device) -> MemoryLimit:
        """The limit of a device."""
        return cls(CudaMeter(device) if device.type == "cuda" else None)

    def samples(self, share: int) -> int | None:
        """Most samples for one pass over a share of so many; None is no limit."""
        if self._meter is None:
            return None
        if self._safe is None:
            # No pass of a single sample: a batch norm of one raises.
            return max(1, math.ceil(share / min(FIRST_PARTS, max(1, share // 2))))
        return max(2, self._safe)

    def step_begins(self) -> None:
        """What is measured from here on belongs to the next step."""
        if self._meter is not None:
            self._in_use = self._meter.reset()

    def step_done(self, samples: int) -> None:
        """A whole step went through, in passes of at most so many samples."""
        if self._meter is None:
            return
        taken = max(self._meter.peak_bytes() - self._in_use, 1)
        room = (PART * self._meter.total_bytes() - self._in_use) / taken
        fits = max(1, int(samples * min(room, MOST_GROWTH)))
        # A small last batch of an epoch says little; one that took too much says all.
        self._safe = fits if room < 1 or self._safe is None else max(self._safe, fits)
