"""Batches by sample index, fetched ahead where there are processes to do so.

A `DataLoader` is told the order of its batches once and works through it. Here the part of a batch that a worker needs
changes with the membership, so samples are fetched, kept and looked up one by one: after a change only those that are
not there yet are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset, default_collate

from raytrain_het.errors import ConfigError, DataProcessError
from raytrain_het.training.cursor import micro_batches
from raytrain_het.training.sample_pool import PackedSamples, SamplePool
from raytrain_het.training.sample_source import SampleSource

_MAX_CHUNK = 32

_Key = tuple[int, int]  # (epoch, dataset index)


class SampleFetcher:
    """Fetches the samples of a map-style dataset by index and collates them as torch's `DataLoader` would.

    Random numbers that a dataset draws for a sample, from the global generators of torch (CPU), numpy and Python, are
    seeded by (seed, epoch, index): the sample is the same whichever worker fetches it, ahead or not, once or again. The
    caller's generators are left as they were. Generators of the dataset's own are its own affair.

    One thread at a time may use it.

    Args:
        dataset: map-style. ``__getitems__`` is used if it has one (see `SampleSource`).
        collate_fn: makes a batch of a list of samples; ``None`` is torch's ``default_collate``. Runs in the calling
            thread. A ``TensorDataset`` (or ``Subset`` of one) with the default is indexed directly.
        num_workers: processes that fetch ahead, each with a copy of the dataset; 0 fetches in the calling thread.
        seed: the run's seed, from 0.

    Attributes:
        num_fetched: samples asked of the dataset so far, here or in the processes.

    Raises:
        ConfigError: ``num_workers`` is not a whole number from 0, or the dataset cannot be sent to processes.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if not isinstance(num_workers, int) or num_workers < 0:
            raise ConfigError(f"num_workers={num_workers!r} is not valid: allowed is a whole number from 0.")
        self.num_fetched = 0
        self._collate = default_collate if collate_fn is None else collate_fn
        self._num_workers = num_workers
        self._tensors = _tensors_of(dataset) if self._collate is default_collate else None
        self._dataset = dataset
        self._source = SampleSource(dataset, seed)
        self._pool = SamplePool(dataset, seed, num_workers) if num_workers and self._tensors is None else None
        # Oldest first. A sample leaves when it is used, so that one dict is both the queue and the cache.
        self._ahead: dict[_Key, _Chunk] = {}

    def fetch(self, epoch: int, indices: Sequence[int]) -> Any:
        """The collated batch of the samples at ``indices``, in that order.

        Samples fetched ahead for earlier epochs are dropped.

        Raises:
            DataProcessError: a data process died.
            Exception: what the dataset or ``collate_fn`` raised.
        """
        indices = [int(index) for index in indices]
        if self._tensors is not None:
            self.num_fetched += len(indices)
            return _index_tensors(self._dataset, self._tensors, indices)
        if self._pool is None:
            self.num_fetched += len(indices)
            return self._collate(self._source.fetch(epoch, indices))

        keys = [(epoch, index) for index in indices]
        self._request(keys)
        chunks = {key: self._ahead.pop(key) for key in dict.fromkeys(keys)}
        self._drop(key for key in list(self._ahead) if key[0] < epoch)
        return self._collate([self._sample(chunks[key], key) for key in keys])

    def prefetch(self, epoch: int, indices: Sequence[int]) -> None:
        """Say which samples will be needed next, in order. Without processes this does nothing.

        Each call replaces what the last one said: samples that were fetched ahead and are not named again are kept, in
        case they come back, but no more of them than are named now; the oldest go first.

        Raises:
            DataProcessError: a data process died.
        """
        if self._pool is None:
            return
        keys = [(epoch, int(index)) for index in indices]
        wanted = set(keys)
        stale = [key for key in self._ahead if key not in wanted]
        self._drop(stale[: max(0, len(stale) - len(wanted))])
        self._request(keys)

    def close(self) -> None:
        """Drop what was fetched ahead and let the processes go. May be called twice."""
        self._drop(list(self._ahead))
        if self._pool is not None:
            self._pool.close()

    def _request(self, keys: Sequence[_Key]) -> None:
        assert self._pool is not None
        missing = list(dict.fromkeys(key for key in keys if key not in self._ahead))
        # Small enough that all processes share the work, and none works long at what turns out stale.
        for part in micro_batches(range(len(missing)), min(_MAX_CHUNK, -(-len(missing) // self._num_workers) or 1)):
            chunk_keys = missing[part.start : part.stop]
            try:
                future = self._pool.submit(chunk_keys[0][0], [index for _, index in chunk_keys])
            except BrokenProcessPool as error:
                raise self._died() from error
            self.num_fetched += len(chunk_keys)
            self._ahead.update(dict.fromkeys(chunk_keys, _Chunk(future, chunk_keys)))

    def _sample(self, chunk: _Chunk, key: _Key) -> Any:
        try:
            return chunk.sample(key)
        except BrokenProcessPool as error:
            raise self._died() from error

    def _drop(self, keys: Iterable[_Key]) -> None:
        for key in keys:
            self._ahead.pop(key).drop(key)

    def _died(self) -> DataProcessError:
        return DataProcessError(
            f"One of the num_workers={self._num_workers} data processes died while fetching samples; the usual reasons "
            "are too little memory (each holds a copy of the dataset), too little shared memory in a container (give "
            "it more: docker run --shm-size=8g), and a crash in the dataset's native code. Write a smaller "
            "num_workers, or num_workers=0 to see a crash where it happens."
        )


class _Chunk:
    """Samples that one process fetches in one go."""

    def __init__(self, future: Future[PackedSamples], keys: list[_Key]) -> None:
        self._future: Future[PackedSamples] | None = future
        self._positions = {key: position for position, key in enumerate(keys)}
        self._live = set(keys)
        self._samples: list[Any] = []

    def sample(self, key: _Key) -> Any:
        if self._future is not None:
            self._samples = self._future.result().unpack()
            self._future = None
        return self._samples[self._positions[key]]

    def drop(self, key: _Key) -> None:
        self._live.discard(key)
        if not self._live and self._future is not None:
            self._future.cancel()


def _tensors_of(dataset: Any) -> tuple[torch.Tensor, ...] | None:
    # By exact type: a subclass may override __getitem__.
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset.tensors if type(dataset) is TensorDataset else None


def _index_tensors(dataset: Any, tensors: tuple[torch.Tensor, ...], indices: list[int]) -> list[torch.Tensor]:
    while type(dataset) is Subset:
        indices = [int(dataset.indices[index]) for index in indices]
        dataset = dataset.dataset
    where = torch.tensor(indices, dtype=torch.int64)
    return [tensor.index_select(0, where.to(tensor.device)) for tensor in tensors]
