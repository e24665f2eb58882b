"""Where a worker's training function is, in words. The hub tells people from it who waits for whom."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

STEP = "step"


@dataclass(frozen=True)
class Place:
    """Where one worker is, as it said last."""

    text: str = ""
    """Such as "computing step 13". Empty where it has not said."""
    waits: bool = False
    """Whether its training function waits for somebody else."""
    kind: str = STEP
    """What it is in: "step", "report", "evaluate" or "returned"."""


class Doing:
    """A worker's own place. The training thread writes it, and the thread that answers pings reads it."""

    def __init__(self) -> None:
        self.otherwise: Callable[[bool], str] = lambda waits: ""
        """Says what is done between the calls below, given whether the training thread waits."""
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
        calls = self._calls[-1:]  # One read: the call may end meanwhile.
        if calls:
            kind, text = calls[0]
            return Place(text, waits, kind)
        return Place(self.otherwise(waits), waits)
