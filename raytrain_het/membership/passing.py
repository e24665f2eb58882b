"""Who has gone past a report without its part: known from what workers say of themselves, whatever message was lost.

A worker makes a report of step ``k`` after it has committed ``k`` and before it commits ``k + 1``. So one that says "I
have committed 13, and my last report was of step 8" will never make one of step 12; and so will one whose report of
step 16 says that the one before was of step 8. Such a word is true for ever, so each is kept.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Container
from dataclasses import dataclass

from raytrain_het.membership.message_parts import Told

Order = tuple[int, ...]

MAX_WORDS = 100
"""Of one worker: reports are settled long before so many more were made."""


def order(key: str) -> Order:
    """(life, step, ordinal) of a key."""
    return tuple(map(int, key.split(".")))


@dataclass(frozen=True)
class _Word:
    """Between these two, ends excluded, a worker has made no report and will make none."""

    after: Order
    before: Order
    how: str


class Passing:
    """By slot: what its worker has said."""

    def __init__(self) -> None:
        self._words: dict[int, deque[_Word]] = {}

    def told(self, slot: int, told: Told | None) -> None:
        """A worker's word of itself.

        ``began`` is the first step whose reports it has to do with, ``step`` the last that its loop has committed,
        ``reported`` the key of its last report, and ``complete`` says that its loop over epochs has come to its end.
        """
        if not told:
            return
        life, step = told.life, told.step
        before = (life, step, sys.maxsize) if told.complete else (life, step, -1)
        how = "has finished without it" if told.complete else f"has gone on to step {step} without it"
        self._note(slot, told, before, how)

    def called(self, slot: int, key: str, told: Told | None) -> None:
        """A part of a report has come, with what its worker could tell just before it made it."""
        if told:
            self._note(slot, told, order(key), f"has gone on to its report of step {order(key)[1]} without it")

    def _note(self, slot: int, told: Told, before: Order, how: str) -> None:
        began = (told.life, told.began, -1)
        after = max(began, order(told.reported)) if told.reported else began
        words = self._words.setdefault(slot, deque(maxlen=MAX_WORDS))
        # While a worker makes no reports its last word says all that those before it said.
        if words and words[-1].after == after and words[-1].before <= before:
            words.pop()
        if after < before and after[0] == before[0]:
            words.append(_Word(after, before, how))

    def without(self, key: str, given: Container[int]) -> dict[int, str]:
        """By slot: how those went past this report that have not ``given`` their part."""
        this = order(key)
        found = {}
        for slot, words in self._words.items():
            word = next((w for w in words if w.after < this < w.before), None)
            if word is not None and slot not in given:
                found[slot] = word.how
        return found

    def forget(self, slot: int) -> None:
        """Its process is gone: what the next one says is its own."""
        self._words.pop(slot, None)
