"""Workers that have gone past a report without their part. Their own words show it, even if a message was lost.

A worker makes a report of step ``k`` after it has committed ``k`` and before it commits ``k + 1``. So one that says "I
have committed 13, and my last report was of step 8" will never make one of step 12; and so will one whose report of
step 16 says that the one before was of step 8. What a worker has said once stays true, so it is kept.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Container
from dataclasses import dataclass

from raytrain_het.membership.message_parts import LoopProgress

Order = tuple[int, ...]

MAX_WORDS = 100
"""So many words of one worker are kept: reports are settled long before so many more were made."""


def order(key: str) -> Order:
    """(life, step, ordinal) of a key."""
    return tuple(map(int, key.split(".")))


@dataclass(frozen=True)
class _Word:
    """A worker has made no report between these two, ends excluded, and will make none."""

    after: Order
    before: Order
    how: str


class SkippedReports:
    """What workers have said, by slot."""

    def __init__(self) -> None:
        self._words: dict[int, deque[_Word]] = {}

    def note_progress(self, slot: int, progress: LoopProgress | None) -> None:
        """A worker has said how far its loop is."""
        if not progress:
            return
        life, step = progress.life, progress.step
        before = (life, step, sys.maxsize) if progress.complete else (life, step, -1)
        how = "has finished without it" if progress.complete else f"has gone on to step {step} without it"
        self._note(slot, progress, before, how)

    def called(self, slot: int, key: str, progress: LoopProgress | None) -> None:
        """A part of a report has come, with what its worker could tell just before it made it."""
        if progress:
            self._note(slot, progress, order(key), f"has gone on to its report of step {order(key)[1]} without it")

    def _note(self, slot: int, progress: LoopProgress, before: Order, how: str) -> None:
        began = (progress.life, progress.began, -1)
        after = max(began, order(progress.reported)) if progress.reported else began
        words = self._words.setdefault(slot, deque(maxlen=MAX_WORDS))
        # While a worker makes no reports its last word says all that the words before it said.
        if words and words[-1].after == after and words[-1].before <= before:
            words.pop()
        if after < before and after[0] == before[0]:
            words.append(_Word(after, before, how))

    def without(self, key: str, given: Container[int]) -> dict[int, str]:
        """By slot, how workers have gone past this report. Those in ``given`` have given their part."""
        this = order(key)
        found = {}
        for slot, words in self._words.items():
            word = next((w for w in words if w.after < this < w.before), None)
            if word is not None and slot not in given:
                found[slot] = word.how
        return found

    def forget(self, slot: int) -> None:
        """A slot's process is gone: what the next one says is of itself only."""
        self._words.pop(slot, None)
