"""The order of each epoch from a sampler of the user's: a pure function of the run's seed and the epoch.

Every worker iterates the sampler for itself, and so does one that comes at epoch 5. What a sampler may depend on is
therefore set before each time: torch's, numpy's and Python's global generators, generators that it holds, and the epoch
by ``set_epoch`` where it has that method. A sampler that depends on how often it was iterated is refused.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from raytrain_het.errors import ConfigError
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.data.data_plan import DataPlan
from raytrain_het.worker.data.epoch_order import EpochOrder
from raytrain_het.worker.data.forked_generators import seed_of, seeded

_MOST = 1_000_000
"""So many indices an epoch may have in any case, and a hundred times the dataset, and what the sampler's len() says."""

_FUNCTIONS_OF_THE_GENERATOR = (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


def orders_of(loader: DataLoader, *, seed: int) -> SamplerOrders | None:
    """What knows the loader's orders; None for plain ``shuffle=True`` and ``shuffle=False``, which are the run's own.

    Raises:
        LoopOrderError: the loader makes no batches, iterates in a way of its own, or has a sampler that is not a
            function of the epoch, or is made for one of several workers.
    """
    if type(loader).__iter__ is not DataLoader.__iter__ or type(loader)._get_iterator is not DataLoader._get_iterator:
        raise refuse("loader that iterates in its own way", type(loader).__name__)
    batches = loader.batch_size is None
    sampler = loader.batch_sampler if batches else loader.sampler
    if sampler is None:
        raise refuse("loader without batches")
    if not batches and loader.generator is None and _is_plain(sampler, loader.dataset):
        return None
    orders = SamplerOrders(sampler, batches=batches, seed=seed, most=max(_MOST, 100 * len(loader.dataset)))  # type: ignore[arg-type]
    orders.check()
    return orders


def _is_plain(sampler: Any, dataset: Any) -> bool:
    if type(sampler) is SequentialSampler:
        return len(sampler.data_source) == len(dataset)
    return (
        type(sampler) is RandomSampler
        and len(sampler.data_source) == len(dataset)
        and not sampler.replacement
        and sampler.generator is None
        and sampler.num_samples == len(dataset)
    )


class SamplerOrders:
    """Iterates one sampler, the same way for the same epoch.

    Args:
        sampler: yields indices, or lists of them.
        batches: whether it yields lists: the global batches.
        seed: the run's.
        most: so many indices, or what ``len(sampler)`` says, an epoch may have.
    """

    def __init__(self, sampler: Any, *, batches: bool, seed: int, most: int) -> None:
        self._sampler, self._batches, self._seed, self._most = sampler, batches, seed, most
        self._lock = threading.RLock()  # A worker that heals follows the others' steps in another thread.
        self._seen: dict[str, float] = {}
        """The sampler's numbers after it was last iterated: those that differ later were set by hand."""
        for part in _parts(sampler):
            if isinstance(part, DistributedSampler) or _deals_out(part):
                raise refuse("sampler of a part", type(part).__name__)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    @property
    def name(self) -> str:
        """The sampler's class."""
        return type(self._sampler).__name__

    def order(self, epoch: int) -> EpochOrder:
        """The order of one epoch. Global generators and the sampler's own are left as they were.

        Raises:
            LoopOrderError: the sampler does not end, or was told another epoch by hand.
            ConfigError: it gave something that is no index.
        """
        with self._lock, seeded(seed_of("order", self._seed, epoch)), self._own_generators(epoch):
            self._set_epoch(epoch)
            order = self._listed()
            self._seen = self._numbers()
            return order

    def _set_epoch(self, epoch: int) -> None:
        before = self._numbers()
        for part in _parts(self._sampler):
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)
        for name, now in self._numbers().items():
            if name in before and before[name] != self._seen.get(name, before[name]) and now != before[name]:
                raise refuse("sampler told another epoch", f"{name} was set to {before[name]} in epoch {epoch}")

    def check(self) -> None:
        """Notice a sampler that is no function of the epoch.

        Raises:
            LoopOrderError: it gives another order when it is asked again, or counts how often it was.
        """
        parts = _parts(self._sampler)
        inner = [part.sampler for part in parts if type(part) is BatchSampler]
        if all(type(part) in _FUNCTIONS_OF_THE_GENERATOR for part in (*parts, *inner)):
            return
        first = self.order(0)
        counts = self._numbers()
        self.order(1)
        again = self.order(0)
        if first.digest() != again.digest():
            raise refuse("sampler that changes by itself", self.name)
        for name, value in self._numbers().items():
            if counts.get(name) != value:
                raise refuse("sampler that changes by itself", f"{name} is another number each time")

    def _numbers(self) -> dict[str, float]:
        return {
            f"{type(part).__name__}.{name}": value
            for part in _parts(self._sampler)
            for name, value in _attributes(part).items()
            if type(value) in (int, float)
        }

    @contextlib.contextmanager
    def _own_generators(self, epoch: int) -> Iterator[None]:
        held = [v for part in _parts(self._sampler) for v in _attributes(part).values()]
        generators = list({id(g): g for g in held if isinstance(g, torch.Generator)}.values())
        states = [g.get_state() for g in generators]
        try:
            for g in generators:
                g.manual_seed(seed_of("order", g.initial_seed(), epoch) >> 1)
            yield
        finally:
            for g, state in zip(generators, states, strict=True):
                g.set_state(state)

    def _listed(self) -> EpochOrder:
        indices: list[Any] = []
        bounds = [0]
        most = max(self._most, _length(self._sampler))
        for entry in self._sampler:
            if self._batches:
                indices += self._batch(entry)
                bounds.append(len(indices))
            else:
                indices.append(entry)
            if len(indices) > most:
                raise refuse("sampler without end", f"{self.name} gave more than {most} indices")
        cuts = np.array(bounds, dtype=np.int64) if self._batches else None
        return EpochOrder(indices=self._whole(indices), bounds=cuts)

    def _batch(self, entry: Any) -> list[Any]:
        try:
            batch = entry.tolist() if hasattr(entry, "tolist") else list(entry)
        except TypeError:
            batch = entry
        if not isinstance(batch, list) or not batch:
            raise ConfigError(
                f"batch_sampler={self.name} gave {entry!r} as a batch: allowed is a list of at least one index. For "
                "single indices write DataLoader(dataset, batch_size=..., sampler=...)."
            )
        return batch

    def _whole(self, indices: list[Any]) -> np.ndarray:
        with contextlib.suppress(ValueError, TypeError, RuntimeError, OverflowError):
            array = np.asarray(indices)
            if array.ndim == 1 and array.dtype.kind == "i":
                return array.astype(np.int64)
        return np.array([self._index(index) for index in indices], dtype=np.int64)

    def _index(self, index: Any) -> int:
        try:
            if not isinstance(index, bool) and abs(number := operator.index(index)) < 2**63:
                return number
        except TypeError:
            pass
        raise ConfigError(
            f"sampler={self.name} gave the index {index!r}: allowed are whole numbers from 0. What else belongs to a "
            "sample (a size, a key) is looked up by its index in the dataset's __getitem__."
        )


def check_epoch(plan: DataPlan, size: int, epoch: int) -> None:
    """Look at what a sampler gave for an epoch.

    Args:
        plan: of the sampler.
        size: samples in the dataset now.
        epoch: that begins.

    Raises:
        ConfigError: an index is of no sample, or there is no step at all.
    """
    name, indices = plan.sampler.split()[0], plan.permutation(epoch)
    if plan.steps_in(epoch) == 0:
        raise ConfigError(
            f"sampler={name} gave {len(indices)} indices in epoch {epoch}, which makes no step with "
            f"global_batch_size={plan.global_batch_size} and drop_last={plan.drop_last}: an epoch needs one step at "
            "least. Write drop_last=False, or a smaller global batch."
        )
    bad = indices[(indices < 0) | (indices >= size)]
    if len(bad):
        raise ConfigError(
            f"sampler={name} gave the index {bad[0]} in epoch {epoch}: allowed is 0 to {size - 1}, as the dataset has "
            f"{size} samples. Give the sampler this dataset's length."
        )


def _parts(sampler: Any) -> list[Any]:
    """The sampler and all samplers that it holds, itself first."""
    found: list[Any] = []
    waiting = [sampler]
    while waiting:
        part = waiting.pop()
        if any(part is other for other in found):
            continue
        found.append(part)
        for name, value in _attributes(part).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            if len(held) <= 100:
                named = name.strip("_") in ("sampler", "batch_sampler")
                waiting += [v for v in held if isinstance(v, Sampler) or (named and hasattr(v, "__dict__"))]
    return found


def _attributes(part: Any) -> dict[str, Any]:
    return dict(getattr(part, "__dict__", {}))


def _deals_out(part: Any) -> bool:
    replicas = getattr(part, "num_replicas", None)
    return isinstance(replicas, int) and replicas > 1 and hasattr(part, "rank")


def _length(sampler: Any) -> int:
    try:
        return len(sampler)
    except (TypeError, NotImplementedError, AttributeError):
        return 0
