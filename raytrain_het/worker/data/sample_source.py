"""Samples of a dataset whose random augmentation belongs to the sample, not to the process that fetches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from raytrain_het.worker.data.forked_generators import GlobalGenerators, seed_everything


def sample_seeds(seed: int, epoch: int, indices: Sequence[int], repeats: Sequence[int] | None = None) -> np.ndarray:
    """64-bit seeds of samples: a hash of (seed, epoch, index, repeat), the same on every platform.

    Args:
        seed: the run's seed, from 0.
        epoch: from 0.
        indices: n dataset indices.
        repeats: how often each was used before in the epoch; by default never.

    Returns:
        uint64, shape ``[n]``.
    """
    key = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)
    # splitmix64 of the indices, from a start that depends on seed and epoch; a SeedSequence a sample costs 10 us.
    x = key + np.asarray(indices, dtype=np.int64).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    if repeats is not None:
        x = x + np.asarray(repeats, dtype=np.int64).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleSource:
    """Fetches samples by index in this process, each under its own seed.

    A dataset with ``__getitems__`` is asked for all indices at once as long as that draws no random numbers. Once it
    does draw (a ``Subset`` of an augmenting dataset, for one), what it returned is thrown away and it is asked for one
    index at a time from then on: numbers drawn for a whole list would depend on who else is in the list.

    Args:
        dataset: map-style, with ``__getitem__`` or ``__getitems__``.
        seed: the run's seed.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._getitems: Callable[[list[int]], Sequence[Any]] | None = getattr(dataset, "__getitems__", None)
        self._draws = False

    def fetch(self, epoch: int, indices: Sequence[int], repeats: Sequence[int] | None = None) -> list[Any]:
        """The samples at ``indices``, in order. The global generators are left as they were.

        Args:
            epoch: from 0.
            indices: of the dataset.
            repeats: how often each was used before in the epoch: its random numbers are others each time.
        """
        indices = [int(index) for index in indices]
        before = GlobalGenerators()
        try:
            if self._getitems is not None and not self._draws:
                samples = list(self._getitems(indices))
                if len(samples) != len(indices):
                    raise ValueError(
                        f"{type(self._dataset).__name__}.__getitems__ returned {len(samples)} samples for "
                        f"{len(indices)} indices: it must return one sample per index, in order."
                    )
                if not before.moved():
                    return samples
                self._draws = True
            samples = []
            seeds = sample_seeds(self._seed, epoch, indices, repeats).tolist()
            for index, seed in zip(indices, seeds, strict=True):
                seed_everything(seed)
                samples.append(self._dataset[index] if self._getitems is None else self._getitems([index])[0])
            return samples
        finally:
            before.restore()
