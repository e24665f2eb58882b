"""Where a worker's training function is, in words: for the hub, which says who waits for whom."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

STEP = "step"


@dataclass(frozen=True)
class Place:
    """What one worker is at, as it told last."""

    text: str = ""
    """Such as "computing step 13". Empty where it has not said."""
    waits: bool = False
    """Whether its training function waits for somebody else."""
    kind: str = STEP
    """What it is in: "step", "report", "evaluate" or "returned"."""


class Doing:
    """One worker's own: the training thread writes, the thread that answers pings reads."""

    def __init__(self) -> None:
        self.otherwise: Callable[[bool], str] = lambda waits: ""
        """In words what is done between the calls below, given whether the training thread waits."""
        self._calls: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def call(self, kind: str, text: str) -> Iterator[None]:
        """While this lasts the training thread is in a call of ours, such as ``report()``."""
        self._calls.append((kind, text))
        try:
            yield
        finally:
            self._calls.pop()

    def place(self, waits: bool) -> Place:
        """Where the training thread is now."""
        calls = self._calls[-1:]  # In one go: it may be leaving.
        if calls:
            kind, text = calls[0]
            return Place(text, waits, kind)
        return Place(self.otherwise(waits), waits)
