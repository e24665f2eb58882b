"""The process's global random generators, seeded for a while and given back as they were."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_of(*what: object) -> int:
    """A 64-bit seed: a hash of texts and whole numbers, the same on every platform."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little")


def seed_everything(seed: int) -> None:
    """Seed the global generators that draw on the CPU: torch's, numpy's and Python's. ``seed`` has 64 bits."""
    # torch and numpy run the same generator and use 32 bits of a seed: from equal bits they would draw equal numbers.
    # torch.manual_seed would seed accelerators as well, which takes a hundred times longer.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed >> 32)
    random.seed(seed)


class GlobalGenerators:
    """The states of torch's (CPU), numpy's and Python's global generators at one moment."""

    def __init__(self) -> None:
        self._torch = torch.default_generator.get_state()
        self._numpy: Any = np.random.get_state()
        self._python = random.getstate()

    def restore(self) -> None:
        """Set all three back."""
        torch.default_generator.set_state(self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    def moved(self) -> bool:
        """Whether anybody has drawn a number, or seeded, since."""
        numpy_now: Any = np.random.get_state()
        return not (
            torch.equal(torch.default_generator.get_state(), self._torch)
            and numpy_now[2:] == self._numpy[2:]
            and np.array_equal(numpy_now[1], self._numpy[1])
            and random.getstate() == self._python
        )


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within the block the global generators start from ``seed``; after it they are as they were before.

    Args:
        seed: 64 bits, see :func:`seed_of`.
        device: its generator is seeded too, if it is a CUDA device that is in use.
    """
    on_gpu = device is not None and device.type == "cuda" and torch.cuda.is_initialized()
    before = GlobalGenerators()
    before_on_gpu = torch.cuda.get_rng_state(device) if on_gpu and device is not None else None
    try:
        seed_everything(seed)
        if before_on_gpu is not None:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
    finally:
        before.restore()
        if before_on_gpu is not None and device is not None:
            torch.cuda.set_rng_state(before_on_gpu, device)
