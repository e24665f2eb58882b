"""A reduction over samples: what a loss consists of."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Reduction:
    """One reduction over samples that a loss consists of."""

    kind: str
    """mean; sum; quotient, of a sum and a number; or bent, a function that is not linear in a reduction."""
    count: float | None
    """What a mean is over, or a sum was divided by."""
    name: str
    """As autograd calls it."""
    exact: bool = True
    """Whether the count was not rounded."""
    factor: float | None = None
    """One over what it is multiplied by, where that is known."""
    size: int = 0
    """How many numbers are reduced."""
    divisor: float | None = None
    """Of a quotient: what stands below the line, where nothing is multiplied."""
    weighted: bool = False
    """Whether classes have weights, or some of the targets were left out."""
    by_samples: bool = False
    """Whether a multiple of the number of samples is among what a sum is divided by."""

    @property
    def is_finite(self) -> bool:
        """Whether its numbers are: those of a loss that overflowed say nothing."""
        return all(math.isfinite(x) for x in (self.count, self.factor, self.divisor) if x is not None)
