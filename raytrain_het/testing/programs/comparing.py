"""Whether two states are the same, and where not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

TOLERANCE = 1e-9


def differences(got: dict[str, Any], expected: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in [*expected, *(n for n in got if n not in expected)]:
        if name not in got or name not in expected:
            yield name, f"is {'missing' if name not in got else 'not there with torch alone'}"
            continue
        a, b = got[name], expected[name]
        error = error_of(a, b)
        if not error < (1e-5 if isinstance(b, torch.Tensor) and b.dtype == torch.float32 else TOLERANCE):
            yield name, f"is off by {error:.2g}"


def error_of(got: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value; infinite where they are not comparable."""
    if isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return math.inf
        if not got.numel() or torch.equal(got, expected):
            return 0.0
        if not got.is_floating_point() and not got.is_complex():
            return float((got.double() - expected.double()).abs().max())
        a, b = (got, expected) if got.is_complex() else (got.double(), expected.double())
        same = (a == b) | (torch.isnan(a.abs()) & torch.isnan(b.abs()))
        difference = torch.where(same, 0.0, (a - b).abs())
        finite = b.abs()[torch.isfinite(b.abs())]
        scale = max(float(finite.max()) if finite.numel() else 0.0, 1e-6)
        error = float(difference.max()) / scale
        return error if not math.isnan(error) else math.inf
    if isinstance(expected, tuple | list) and isinstance(got, tuple | list) and len(got) == len(expected):
        return max((error_of(a, b) for a, b in zip(got, expected, strict=True)), default=0.0)
    if isinstance(expected, int | float) and isinstance(got, int | float):
        if got == expected or (math.isnan(got) and math.isnan(expected)):
            return 0.0
        error = abs(got - expected) / max(abs(expected), 1e-6)
        return error if not math.isnan(error) else math.inf
    return 0.0 if got == expected else math.inf


def same_bits(one: Any, other: Any) -> bool:
    """Whether two values are the same to the bit; NaNs are."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    return bool(one == other)
