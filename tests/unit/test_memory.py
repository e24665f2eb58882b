"""The memory limit: found by trying, from below."""

from __future__ import annotations

import pytest
import torch

from raytrain_het.worker.data.data_plan import micro_batches
from raytrain_het.worker.step.memory import MemoryLimit


class Meter:
    """A device of so many bytes on which a pass over b samples takes ``fixed + each * b``."""

    def __init__(self, total: int, fixed: int, each: int) -> None:
        self.total, self.fixed, self.each = total, fixed, each
        self.peak = fixed
        self.kept = 0

    def reset(self) -> int:
        self.peak = self.kept + self.fixed
        return self.kept + self.fixed // 2

    def peak_bytes(self) -> int:
        return self.peak

    def total_bytes(self) -> int:
        return self.total

    def run(self, samples: int) -> None:
        self.peak = max(self.peak, self.kept + self.fixed + self.each * samples)
        assert self.peak <= self.total, "out of memory"


def passes(limit: MemoryLimit, meter: Meter, share: int, steps: int) -> list[list[int]]:
    """Sizes of the passes of each step; the rest of a step is cut anew after each of them, as the engine does."""
    sizes: list[list[int]] = []
    for _ in range(steps):
        limit.step_begins()
        sizes.append([])
        while left := share - sum(sizes[-1]):
            size = len(micro_batches(range(left), limit.samples, least=2)[0])
            meter.run(size)
            sizes[-1].append(size)
            limit.passed(max(sizes[-1]))
    return sizes


@pytest.mark.parametrize(("fixed", "each"), [(0, 10), (5000, 1), (9000, 1), (100, 40), (100, 2000), (8000, 400)])
@pytest.mark.parametrize("share", [2, 7, 64, 801])
def test_passes_grow_to_what_fits_and_never_run_out_of_memory(fixed: int, each: int, share: int) -> None:
    sizes = passes(MemoryLimit(meter := Meter(10_000, fixed, each)), meter, share, 20)
    assert sizes[0][0] == (2 if share % 2 == 0 else 3)
    most = max(3, int((9000 - fixed) / each))
    # What is in use before a pass is half of what does not grow with it: the bound comes close from below.
    assert min(share, 0.6 * most) <= max(sizes[-1]) <= min(share, most)
    assert min(map(min, sizes)) >= 2


def test_the_first_step_takes_few_passes_whatever_the_share() -> None:
    sizes = passes(MemoryLimit(meter := Meter(10_000, 0, 1)), meter, 800, 1)
    assert len(sizes[0]) <= 6


def test_what_the_optimizer_keeps_from_the_first_step_on_is_left_room_for() -> None:
    meter = Meter(10_000, 0, 10)
    limit = MemoryLimit(meter)
    before = max(passes(limit, meter, 800, 5)[-1])
    meter.kept = 4000
    after = max(passes(limit, meter, 800, 3)[-1])
    assert 250 <= after <= 500 < before  # Of 10 bytes each: a tenth of the memory stays free.


def test_a_peak_beyond_the_limit_makes_passes_smaller_again() -> None:
    meter = Meter(10_000, 0, 10)
    limit = MemoryLimit(meter)
    passes(limit, meter, 800, 5)
    meter.each = 12  # Longer samples came.
    assert max(passes(limit, meter, 800, 3)[-1]) <= 750


def test_a_cpu_has_no_limit() -> None:
    limit = MemoryLimit.of(torch.device("cpu"))
    limit.step_begins()
    limit.passed(5)
    assert limit.samples is None
