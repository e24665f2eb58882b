"""One epoch's order of samples, as a sampler gave it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochOrder:
    """Which samples an epoch uses, in order, and where its batches are cut if the sampler says so."""

    indices: np.ndarray
    """Dataset indices: int64, ``[size]``. One index may be there several times."""

    bounds: np.ndarray | None = None
    """Where each global batch begins, and where the last one ends: int64, ``[steps + 1]``. None: every B samples."""

    def repeats(self) -> np.ndarray | None:
        """How often each entry's index was there before it: int64, ``[size]``. None if no index is there twice."""
        by_index = np.argsort(self.indices, kind="stable")
        ordered = self.indices[by_index]
        first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        if first.all():
            return None
        positions = np.arange(len(ordered))
        begins = np.maximum.accumulate(np.where(first, positions, 0))
        counts = np.empty_like(self.indices)
        counts[by_index] = positions - begins
        return counts

    def digest(self, *more: object) -> int:
        """63 bits of indices, bounds and whatever else is given: equal on all workers that have the same order."""
        state = hashlib.blake2b(repr(more).encode(), digest_size=8)
        for part in (self.indices, self.bounds):
            state.update(b"|" if part is None else np.ascontiguousarray(part, dtype="<i8").tobytes())
        return int.from_bytes(state.digest(), "little") >> 1


class Orders(Protocol):
    """What knows the order of every epoch: a pure function of the epoch."""

    def order(self, epoch: int) -> EpochOrder:
        """That of one epoch, computed anew."""
