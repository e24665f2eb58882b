"""Batches by sample index, fetched ahead where there are processes to do so.

A `DataLoader` is told the order of its batches once and works through it. Here the part of a batch that a worker needs
changes with the membership, so samples are fetched, kept and looked up one by one: after a change only those that are
not there yet are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from raytrain_het.errors import ConfigError, DataProcessError
from raytrain_het.worker.data.data_plan import micro_batches
from raytrain_het.worker.data.dataset_copies import digest_of
from raytrain_het.worker.data.forked_generators import seed_of
from raytrain_het.worker.data.packed_samples import PackedSamples
from raytrain_het.worker.data.sample_pool import SamplePool, forks
from raytrain_het.worker.data.sample_source import SampleSource

_MAX_CHUNK = 32

_Key = tuple[int, int, int]  # (epoch, dataset index, how often it was used before in the epoch)


@dataclass(frozen=True, kw_only=True)
class DataProcesses:
    """The processes in which samples are fetched ahead, as a ``DataLoader`` has them.

    Raises:
        ConfigError: ``num_workers`` is not a whole number from 0.
    """

    num_workers: int = 0
    """Each has a copy of the dataset; 0 fetches in the calling thread."""
    worker_init_fn: Callable[[int], None] | None = None
    """Called in each process with its number, from 0."""
    context: Any = None
    """How processes are started; None is a server process that forks them."""
    timeout: float = 0
    """How many seconds may pass until a sample is there; 0 is no limit."""
    persistent: bool = False
    """Whether processes keep their first copy of the dataset, whatever becomes of the caller's."""

    def __post_init__(self) -> None:
        if not isinstance(self.num_workers, int) or self.num_workers < 0:
            raise ConfigError(f"num_workers={self.num_workers!r} is not valid: allowed is a whole number from 0.")


class SampleFetcher:
    """Fetches the samples of a map-style dataset by index and collates them as torch's `DataLoader` would.

    Random numbers that a dataset draws for a sample, from the global generators of torch (CPU), numpy and Python, are
    seeded by (seed, epoch, index, repeat): the sample is the same whichever worker fetches it, ahead or not, once or
    again. The caller's generators are left as they were. Generators of the dataset's own are its own affair.

    One thread at a time may use it.

    Args:
        dataset: map-style. ``__getitems__`` is used if it has one (see `SampleSource`).
        collate_fn: makes a batch of a list of samples; ``None`` is torch's ``default_collate``. Runs in the calling
            thread. A ``TensorDataset`` (or ``Subset`` of one) with the default is indexed directly.
        seed: the run's seed, from 0.
        processes: which fetch ahead.

    Attributes:
        num_fetched: samples asked of the dataset so far, here or in the processes.

    Raises:
        ConfigError: the dataset cannot be sent to processes.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        seed: int = 0,
        processes: DataProcesses | None = None,
    ) -> None:
        processes = processes or DataProcesses()
        num_workers, worker_init_fn = processes.num_workers, processes.worker_init_fn
        self.num_fetched = 0
        self._collate = default_collate if collate_fn is None else collate_fn
        self._num_workers, self._seed, self._timeout = num_workers, seed, processes.timeout
        self._init_fn, self._context, self._persistent = worker_init_fn, processes.context, processes.persistent
        self._direct = (
            self._collate is default_collate
            and not (num_workers and worker_init_fn is not None)
            and _can_be_indexed(dataset)
        )
        self._dataset = dataset
        self._source = SampleSource(dataset, seed)
        self._digest = b""
        self._pool = self._new_pool() if num_workers and not self._direct else None
        # Oldest first. A sample leaves when it is used, so that one dict is both the queue and the cache.
        self._ahead: dict[_Key, _Chunk] = {}

    @classmethod
    def of(cls, loader: DataLoader, collate_fn: Callable[[list[Any]], Any], seed: int) -> SampleFetcher:
        """One that fetches as a ``DataLoader`` was told to."""
        if loader.generator is not None:  # A DataLoader seeds its processes from it.
            seed = seed_of("samples", seed, loader.generator.initial_seed())
        return cls(
            loader.dataset,
            collate_fn,
            seed=seed,
            processes=DataProcesses(
                num_workers=loader.num_workers,
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                context=loader.multiprocessing_context,
                persistent=loader.persistent_workers,
            ),
        )

    def begin_epoch(self) -> None:
        """Let the processes have the dataset as it is now; what they fetched of another one is dropped.

        Raises:
            ConfigError: the dataset cannot be sent to processes.
            DataProcessError: there is no room for its copy.
        """
        if self._pool is None or self._persistent:
            return
        if forks(self._context):  # A copy costs nothing then.
            self.close()
            self._pool = self._new_pool()
        elif self._digest != (now := digest_of(self._dataset, self._init_fn, self._num_workers)):
            self._drop(list(self._ahead))
            self._pool.renew(self._dataset, self._init_fn)
            self._digest = now

    def fetch(self, epoch: int, indices: Sequence[int], repeats: Sequence[int] | None = None) -> Any:
        """The collated batch of the samples at ``indices``, in that order.

        Samples fetched ahead for earlier epochs are dropped.

        Args:
            epoch: from 0.
            indices: of the dataset.
            repeats: how often each was used before in the epoch; by default never.

        Raises:
            DataProcessError: a data process died, or took longer than the loader's ``timeout``.
            Exception: what the dataset or ``collate_fn`` raised.
        """
        indices = [int(index) for index in indices]
        if self._direct:
            self.num_fetched += len(indices)
            return _index_tensors(self._dataset, indices)
        if self._pool is None:
            self.num_fetched += len(indices)
            return self._collate(self._source.fetch(epoch, indices, repeats))

        keys = _keys(epoch, indices, repeats)
        self._request(keys)
        chunks = {key: self._ahead.pop(key) for key in dict.fromkeys(keys)}
        self._drop(key for key in list(self._ahead) if key[0] < epoch)
        return self._collate([self._sample(chunks[key], key) for key in keys])

    def prefetch(self, epoch: int, indices: Sequence[int], repeats: Sequence[int] | None = None) -> None:
        """Say which samples will be needed next, in order. Without processes this does nothing.

        Each call replaces what the last one said: samples that were fetched ahead and are not named again are kept, in
        case they come back, but no more of them than are named now; the oldest go first.

        Raises:
            DataProcessError: a data process died.
        """
        if self._pool is None:
            return
        keys = _keys(epoch, indices, repeats)
        wanted = set(keys)
        stale = [key for key in self._ahead if key not in wanted]
        self._drop(stale[: max(0, len(stale) - len(wanted))])
        self._request(keys)

    def close(self) -> None:
        """Drop what was fetched ahead and let the processes go. May be called twice."""
        self._drop(list(self._ahead))
        if self._pool is not None:
            self._pool.close()

    def _new_pool(self) -> SamplePool:
        if not forks(self._context) and not self._persistent:
            self._digest = digest_of(self._dataset, self._init_fn, self._num_workers)
        return SamplePool(self._dataset, self._seed, self._num_workers, init_fn=self._init_fn, context=self._context)

    def _request(self, keys: Sequence[_Key]) -> None:
        assert self._pool is not None
        missing = list(dict.fromkeys(key for key in keys if key not in self._ahead))
        # Small enough that all processes share the work, and none works long at what turns out stale.
        for part in micro_batches(range(len(missing)), min(_MAX_CHUNK, -(-len(missing) // self._num_workers) or 1)):
            chunk_keys = missing[part.start : part.stop]
            try:
                future = self._pool.submit(
                    chunk_keys[0][0], [key[1] for key in chunk_keys], [key[2] for key in chunk_keys]
                )
            except BrokenProcessPool as error:
                raise self._died() from error
            self.num_fetched += len(chunk_keys)
            self._ahead.update(dict.fromkeys(chunk_keys, _Chunk(future, chunk_keys)))

    def _sample(self, chunk: _Chunk, key: _Key) -> Any:
        try:
            return chunk.sample(key, self._timeout)
        except BrokenProcessPool as error:
            raise self._died() from error
        except FutureTimeoutError as error:
            if chunk.there:  # The dataset's own.
                raise
            raise DataProcessError(
                f"A data process did not give its samples within the loader's timeout={self._timeout} s. Write a "
                "larger timeout, more num_workers, or timeout=0 to wait as long as it takes."
            ) from error

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

    @property
    def there(self) -> bool:
        """Whether the process has done it, well or not."""
        return self._future is None or self._future.done()

    def sample(self, key: _Key, timeout: float = 0) -> Any:
        if self._future is not None:
            self._samples = self._future.result(timeout or None).unpack()
            self._future = None
        return self._samples[self._positions[key]]

    def drop(self, key: _Key) -> None:
        self._live.discard(key)
        if not self._live and self._future is not None:
            self._future.cancel()


def _keys(epoch: int, indices: Sequence[int], repeats: Sequence[int] | None) -> list[_Key]:
    counts = [0] * len(indices) if repeats is None else repeats
    return [(epoch, int(index), int(count)) for index, count in zip(indices, counts, strict=True)]


def _can_be_indexed(dataset: Any) -> bool:
    """Whether a batch can be taken from tensors in one go, with the result that samples one by one would have."""
    # By exact type: a subclass may override __getitem__.
    while type(dataset) is Subset:
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return False
    try:
        for tensor in dataset.tensors:
            if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
                return False
            tensor[:1].index_select(0, torch.zeros(min(1, len(tensor)), dtype=torch.int64, device=tensor.device))
    except RuntimeError:  # Not for every dtype.
        return False
    return True


def _index_tensors(dataset: Any, indices: list[int]) -> list[torch.Tensor]:
    while type(dataset) is Subset:
        indices = [int(dataset.indices[index]) for index in indices]
        dataset = dataset.dataset
    where = torch.tensor(indices, dtype=torch.int64)
    where = torch.where(where < 0, where + len(dataset), where)  # A Subset may count from the end.
    return [tensor.index_select(0, where.to(tensor.device)).contiguous() for tensor in dataset.tensors]
