"""The protocol's points, at which the test kit makes faults happen. Nothing listens in production."""

from __future__ import annotations

from collections.abc import Callable

POINTS = ("slice", "backward", "between_buckets", "decoded", "updated", "report")
"""Before the slice is taken; in the backward pass; between two buckets' exchanges; after the sums are decoded;
after the optimizer's update and before the commit; in a report."""

MARKS = ("opened", "arrived")
"""No faults happen there; they tell listeners that a step was opened, and that the last backward pass of its own is
over."""

listeners: list[Callable[[str, int], None]] = []


def reach(point: str, step: int) -> None:
    """The calling thread has reached a point of a step."""
    for listener in listeners:
        listener(point, step)
