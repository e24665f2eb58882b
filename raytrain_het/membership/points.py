"""The points of a step, for whoever is to be told when a worker reaches them. Nobody is in production."""

from __future__ import annotations

from collections.abc import Callable

POINTS = ("slice", "backward", "between_buckets", "decoded", "updated", "report")
"""Before the slice is taken; in the backward pass; between two buckets' all-reduces; after the means are decoded;
after the optimizer's update and before the commit; in a report. The test kit makes faults happen there."""

MARKS = ("opened", "arrived")
"""No faults happen there: a step was opened; the last backward pass of this worker's own is over."""


class StepPoints:
    """Those of one worker: made by its session, and given to all that reach them."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[str, int], None]] = []
        """Called with the point and the step's number, in the thread that has reached it."""

    def reach(self, point: str, step: int) -> None:
        """The calling thread has reached a point of a step."""
        for listener in self.listeners:
            listener(point, step)
