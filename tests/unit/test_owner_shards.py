"""Slow members own little or nothing of the reduction, and nobody owns much more than an equal part."""

from __future__ import annotations

import pytest

from raytrain_het.allocation.owner_shards import owner_parts


@pytest.mark.parametrize(
    ("speeds", "parts"),
    [
        ([1, 1, 1, 1], [0.25] * 4),
        ([2, 1, 0.5, 0.5], [0.5, 0.5, 0, 0]),
        ([8, 1], [1, 0]),
        ([0, 0, 1, 1], [0, 0, 0.5, 0.5]),
        ([3], [1]),
        ([0, 0], [0, 0]),
    ],
)
def test_parts_go_with_speed(speeds: list[float], parts: list[float]) -> None:
    assert owner_parts(speeds) == pytest.approx(parts)


@pytest.mark.parametrize("speeds", [[30, 1, 1, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1], [1.1, 1.0, 0.9], [100, 50, 1, 1]])
def test_all_is_owned_and_nobody_owns_more_than_twice_an_equal_part(speeds: list[float]) -> None:
    parts = owner_parts(speeds)
    assert sum(parts) == pytest.approx(1)
    assert max(parts) <= 2 / len(speeds) + 1e-9
    assert parts == sorted(parts, reverse=True)
