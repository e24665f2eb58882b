"""The memory limit: found by trying, from below."""

from __future__ import annotations

import pytest
import torch

from raytrain_het.training.memory import MemoryLimit


class Meter:
    """A device of so many bytes on which a pass over b samples takes ``fixed + each * b``."""

    def __init__(self, total: int, fixed: int, each: int) -> None:
        self.total, self.fixed, self.each = total, fixed, each
        self.peak = fixed

    def reset(self) -> int:
        self.peak = self.fixed
        return self.fixed // 2

    def peak_bytes(self) -> int:
        return self.peak

    def total_bytes(self) -> int:
        return self.total

    def run(self, samples: int) -> None:
        self.peak = max(self.peak, self.fixed + self.each * samples)
        assert self.peak <= self.total, "out of memory"


def passes(limit: MemoryLimit, meter: Meter, share: int, steps: int) -> list[int]:
    sizes = []
    for _ in range(steps):
        limit.step_begins()
        size = min(share, limit.samples(share) or share)
        meter.run(size)
        limit.step_done(size)
        sizes.append(size)
    return sizes


@pytest.mark.parametrize(("fixed", "each"), [(0, 10), (5000, 1), (9000, 1), (100, 40)])
@pytest.mark.parametrize("share", [7, 64, 800])
def test_passes_grow_to_what_fits_and_never_run_out_of_memory(fixed: int, each: int, share: int) -> None:
    meter = Meter(10_000, fixed, each)
    if -(-share // min(8, share // 2)) * each + fixed > 10_000:
        pytest.skip("not even the first part fits")
    sizes = passes(MemoryLimit(meter), meter, share, 20)
    assert sizes[0] == -(-share // min(8, share // 2))
    most = max(1, int((9000 - fixed) / each))
    # What is in use before a pass is half of what does not grow with it: the bound comes close from below.
    assert min(share, 0.6 * most) <= sizes[-1] <= max(share, most)


def test_a_peak_beyond_the_limit_makes_passes_smaller_again() -> None:
    meter = Meter(10_000, 0, 10)
    limit = MemoryLimit(meter)
    passes(limit, meter, 800, 5)
    meter.each = 12  # Longer samples came.
    assert passes(limit, meter, 800, 3)[-1] <= 750


def test_a_cpu_has_no_limit() -> None:
    limit = MemoryLimit.of(torch.device("cpu"))
    limit.step_begins()
    limit.step_done(5)
    assert limit.samples(10**9) is None
