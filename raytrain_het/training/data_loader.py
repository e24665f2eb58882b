"""The loader: yields this worker's slice of each global batch, and opens the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from raytrain_het.errors import ConfigError, LoopOrderError
from raytrain_het.plain import plain
from raytrain_het.training.cursor import DataPlan, slice_of
from raytrain_het.training.fetch import SampleFetcher
from raytrain_het.training.weights import checked_weight

if TYPE_CHECKING:
    from raytrain_het.training.engine import Engine, Opened
    from raytrain_het.training.session import Session

logger = logging.getLogger("raytrain_het")


class HetDataLoader:
    """Made by :func:`raytrain_het.prepare_data_loader`. Use it as::

    for epoch in loader.epochs(10):
        for x, y in loader:
            loss = ...
            optimizer.zero_grad(); loss.backward(); optimizer.step()
    """

    def __init__(
        self, session: Session, loader: DataLoader, *, global_batch_size: int | None, micro_batch_size: int | None,
        weight: Callable[[Any], float] | None,
    ) -> None:  # fmt: skip
        if not isinstance(loader, DataLoader):
            raise ConfigError(
                f"prepare_data_loader() got a {type(loader).__name__}: pass a torch.utils.data.DataLoader(dataset, "
                "shuffle=True)."
            )
        self.dataset = loader.dataset
        size = dataset_size(self.dataset)
        batch = plain(loader.batch_size if global_batch_size is None else global_batch_size)
        micro_batch_size = plain(micro_batch_size)
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ConfigError(f"global_batch_size={batch!r} is not valid: allowed is a whole number from 1. Write 512.")
        if batch < session.num_slots:
            raise ConfigError(
                f"global_batch_size={batch} is smaller than the number of workers ({session.num_slots}), so that some "
                f"would never train: allowed is {session.num_slots} or more. Write "
                f"global_batch_size={session.num_slots * 32} (for a job: --set global_batch_size=...), or take fewer "
                "workers."
            )
        if micro_batch_size is not None and (not isinstance(micro_batch_size, int) or micro_batch_size < 1):
            raise ConfigError(
                f"micro_batch_size={micro_batch_size!r} is not valid: allowed is a whole number from 1, or None "
                "(null in a job)."
            )
        if not isinstance(loader.sampler, RandomSampler | SequentialSampler):
            raise ConfigError(
                f"the loader has a {type(loader.sampler).__name__}: allowed are shuffle=True and shuffle=False, since "
                "the order belongs to the run. For another order, wrap the dataset."
            )
        self.global_batch_size = batch
        self.plan = DataPlan(
            dataset_size=size, global_batch_size=batch, shuffle=isinstance(loader.sampler, RandomSampler),
            drop_last=loader.drop_last, seed=session.config.seed,
        )  # fmt: skip
        self._session, self._weight = session, weight
        collate = None if loader.collate_fn is default_collate else loader.collate_fn
        self._fetcher = SampleFetcher(self.dataset, collate, num_workers=loader.num_workers, seed=session.config.seed)
        self._num_workers = loader.num_workers
        self._engine: Engine | None = None
        self._epoch: int | None = None
        session.set_data(self.plan, micro_batch_size, str(getattr(self.dataset, "fingerprint", "")))

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.plan.steps_per_epoch

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """The epochs still to do, up to ``num_epochs``: joins the run, and starts where it stands.

        Raises:
            LoopOrderError: the inner loop was left before its end, or called twice.
        """
        num_epochs = plain(num_epochs)
        if not isinstance(num_epochs, int) or isinstance(num_epochs, bool) or num_epochs < 1:
            raise ConfigError(f"epochs({num_epochs!r}) is not valid: allowed is a whole number from 1.")
        return self._epochs(num_epochs)

    def _epochs(self, num_epochs: int) -> Iterator[int]:
        engine = self._engine = self._session.begin(num_epochs)
        while engine.cursor.epoch < num_epochs:
            self._epoch = epoch = engine.cursor.epoch
            self._session._epoch = epoch
            yield epoch
            if engine.cursor.epoch == epoch:
                raise LoopOrderError(
                    f"the loop over the loader was left in the middle of epoch {epoch}, at step {engine.cursor.step}: "
                    "run it to its end. For a shorter epoch take a torch.utils.data.Subset; to stop for good, return "
                    "from the function."
                )
        self._epoch = None
        self._fetcher.close()

    def __iter__(self) -> Iterator[Any]:
        if self._engine is None or self._epoch is None:
            raise LoopOrderError(
                "the loader was used outside of loader.epochs(): write for epoch in loader.epochs(10): and inside it "
                "for x, y in loader: - a run that heals and resumes has to know its epochs."
            )
        return self._steps(self._engine, self._epoch)

    def _steps(self, engine: Engine, epoch: int) -> Iterator[Any]:
        device = self._session.device
        while (opened := engine.open(epoch)) is not None:
            order = self.plan.permutation(epoch)
            self._prefetch(opened)
            for index, part in enumerate(opened.micro):
                if engine.stale:
                    break
                batch = to_device(self._fetcher.fetch(epoch, [int(order[k]) for k in part]), device)
                weight = checked_weight(self._weight(batch)) if self._weight else float(len(part))
                engine.arm(index, weight, batch)
                yield batch
                engine.body_done()

    def _prefetch(self, opened: Opened) -> None:
        """Ask for this step's samples and the next step's, under the shares now in force."""
        if self._num_workers == 0:
            return
        cursor, record = opened.cursor, opened.record
        rank = record.rank_of(self._session._agent().uid)
        assert rank is not None
        order = self.plan.permutation(cursor.epoch)
        wanted = [int(order[k]) for part in opened.micro for k in part]
        after = self.plan.advance(cursor)
        if not self.plan.is_epoch_end(after):
            wanted += [int(order[k]) for k in slice_of(self.plan.batch_at(after), record.shares, rank)]
        self._fetcher.prefetch(cursor.epoch, wanted)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move all tensors of a batch."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(v, device) for v in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(v, device) for v in batch)
    return batch


def dataset_size(dataset: Dataset) -> int:
    """Number of samples.

    Raises:
        ConfigError: it has no length.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"dataset={type(dataset).__name__} has no length: allowed are map-style datasets with __len__ and "
            "__getitem__, since samples are dealt out by index. Give it both, or read it into a list first."
        )
    size = len(dataset)
    if size == 0:
        raise ConfigError(f"dataset={type(dataset).__name__} is empty: it needs at least one sample.")
    return size
