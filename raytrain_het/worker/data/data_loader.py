"""The loader: yields this worker's slice of each global batch, and opens the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, default_collate

from raytrain_het.errors import ConfigError, LoopOrderError
from raytrain_het.worker.checks.losses import LossCheck, checked_loss
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.checks.weights import checked_weight
from raytrain_het.worker.data.batches import pinned, to_device
from raytrain_het.worker.data.data_plan import DataPlan, slice_of
from raytrain_het.worker.data.fetch import SampleFetcher
from raytrain_het.worker.data.sampler_orders import check_epoch, orders_of
from raytrain_het.worker.data.whole_numbers import whole_number
from raytrain_het.worker.draft import TrainingData

if TYPE_CHECKING:
    from raytrain_het.worker.session import Session
    from raytrain_het.worker.step.engine import Engine
    from raytrain_het.worker.step.open_step import OpenStep

logger = logging.getLogger("raytrain_het")


class HetDataLoader:
    """Made by :func:`raytrain_het.prepare_data_loader`. Use it as::

    for epoch in loader.epochs(10):
        for x, y in loader:
            loss = ...
            optimizer.zero_grad(); loss.backward(); optimizer.step()

    Attributes:
        dataset: the ``DataLoader``'s, as are ``sampler``, ``batch_sampler``, ``num_workers``, ``collate_fn`` and
            ``drop_last``.
        batch_size: the global batch size; None if a ``batch_sampler`` gives the batches.
    """

    def __init__(
        self,
        session: Session,
        loader: DataLoader,
        *,
        global_batch_size: Any,
        micro_batch_size: Any,
        weight: Callable[[Any], float] | None,
        loss: str = "mean",
    ) -> None:
        if not isinstance(loader, DataLoader):
            raise ConfigError(
                f"prepare_data_loader() got a {type(loader).__name__}: pass a torch.utils.data.DataLoader(dataset, "
                "shuffle=True)."
            )
        self.dataset, self.sampler, self.batch_sampler = loader.dataset, loader.sampler, loader.batch_sampler
        self.num_workers, self.collate_fn, self.drop_last = loader.num_workers, loader.collate_fn, loader.drop_last
        self.plan = plan_of(loader, seed=session.config.seed, global_batch_size=global_batch_size)
        self.global_batch_size = batch = self.plan.global_batch_size
        self.batch_size = None if loader.batch_size is None else batch
        if batch < session.num_slots:
            raise ConfigError(
                f"global_batch_size={batch} is smaller than the number of workers ({session.num_slots}), so that some "
                f"would never train: allowed is {session.num_slots} or more. Write "
                f"global_batch_size={session.num_slots * 32} (for a job: --set global_batch_size=...), or take fewer "
                "workers."
            )
        if micro_batch_size is not None:
            micro_batch_size = whole_number(
                micro_batch_size, "micro_batch_size={}", fix=" Or write None (null in a job)."
            )
        self._session, self._weight = session, weight
        self._pins = loader.pin_memory and session.device.type == "cuda"
        self._steps_ahead = (loader.prefetch_factor or 2) - 1
        self._fetcher = SampleFetcher.of(loader, loader.collate_fn, session.config.seed)
        self._engine: Engine | None = None
        self._epoch: int | None = None
        self._begun = False
        """Whether there was a loop over the loader in this epoch."""
        weighed = weight is not None
        session.draft.set_data(
            TrainingData(
                plan=self.plan,
                micro_batch_size=micro_batch_size or session.config.micro_batch_size,
                fingerprint=str(getattr(self.dataset, "fingerprint", "")),
                loss=LossCheck(checked_loss(loss, weighed=weighed), weighed=weighed),
                collate_fn=loader.collate_fn if loader.collate_fn is not default_collate else None,
            )
        )

    def __len__(self) -> int:
        """Steps of the epoch under way."""
        return self.plan.steps_in(self._epoch or 0)

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """The epochs still to do, up to ``num_epochs``: joins the run, and starts where it stands.

        Raises:
            LoopOrderError: the inner loop was left before its end, or called twice.
        """
        num_epochs = whole_number(num_epochs, "epochs({})")
        return self._epochs(num_epochs)

    def _epochs(self, num_epochs: int) -> Iterator[int]:
        worker = self._session.begin(num_epochs)
        engine = self._engine = worker.engine
        while engine.cursor.epoch < num_epochs:
            self._epoch = epoch = engine.cursor.epoch
            worker.epoch = epoch
            self._begun = False
            self.plan.begin_epoch(epoch)
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
                "for x, y in loader: - a run that heals and resumes has to know its epochs. To look at a batch, take "
                "it from the DataLoader that you gave to prepare_data_loader()."
            )
        return self._steps(self._engine, self._epoch)

    def _begin_pass(self, engine: Engine, epoch: int) -> None:
        """The one loop over an epoch begins: what it uses of dataset and sampler is as they are now."""
        if self._begun:
            where = f"epoch {epoch}, after {engine.cursor.step} steps of the run"
            raise refuse("second pass" if engine.cursor.epoch != epoch else "pass begun again", where)
        self._begun = True
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.plan.has_sampler:
            self.plan.begin_epoch(epoch)
            check_epoch(self.plan, size, epoch)
        elif size != self.plan.dataset_size:
            raise refuse("dataset of another length", f"{self.plan.dataset_size} samples, {size} in epoch {epoch}")
        self._fetcher.begin_epoch()

    def _steps(self, engine: Engine, epoch: int) -> Iterator[Any]:
        self._begin_pass(engine, epoch)
        device = self._session.device
        while (opened := engine.open(epoch)) is not None:
            self._prefetch(opened)
            for index, part in enumerate(opened.micro):
                if engine.stale:
                    break
                batch = self._fetcher.fetch(epoch, *self._samples(epoch, part))
                batch = to_device(pinned(batch) if self._pins else batch, device)
                weight = checked_weight(self._weight(batch)) if self._weight else float(len(part))
                engine.begin_pass(index, weight, batch, self._weight)
                try:
                    yield batch
                finally:
                    engine.checks.body_over()
                engine.end_pass()

    def _samples(self, epoch: int, *parts: range) -> tuple[list[int], list[int] | None]:
        """Indices of the samples at these places of the epoch's order, and how often each was used before."""
        order, repeats = self.plan.permutation(epoch), self.plan.repeats(epoch)
        indices = [k for part in parts for k in order[part.start : part.stop].tolist()]
        return indices, None if repeats is None else [k for p in parts for k in repeats[p.start : p.stop].tolist()]

    def _prefetch(self, opened: OpenStep) -> None:
        """Ask for this step's samples and the next ones', under the shares now in force."""
        if self.num_workers == 0:
            return
        cursor = opened.cursor
        wanted, after = list(opened.micro), cursor
        for _ in range(self._steps_ahead):
            after = self.plan.advance(after)
            if self.plan.is_epoch_end(after):
                break
            wanted.append(slice_of(self.plan.batch_at(after), opened.record.shares, opened.rank))
        self._fetcher.prefetch(cursor.epoch, *self._samples(cursor.epoch, *wanted))


def plan_of(loader: DataLoader, *, seed: int, global_batch_size: Any = None) -> DataPlan:
    """The order and the batches of a ``DataLoader``, the same in every process.

    Args:
        loader: map-style.
        seed: the run's.
        global_batch_size: by default the loader's.

    Raises:
        ConfigError: a size is wrong, or does not fit the loader's ``batch_sampler``, or that gives no batches.
        LoopOrderError: see `orders_of`.
    """
    size = dataset_size(loader.dataset)
    orders = orders_of(loader, seed=seed)
    given = loader.batch_size if global_batch_size is None else global_batch_size
    batch = None if given is None else whole_number(given, "global_batch_size={}", fix=" Write 512.")
    if orders is None:
        assert batch is not None
        return DataPlan(
            dataset_size=size,
            global_batch_size=batch,
            shuffle=isinstance(loader.sampler, RandomSampler),
            drop_last=loader.drop_last,
            seed=seed,
        )
    order = orders.order(0)
    if order.bounds is not None:
        if len(order.bounds) < 2:
            raise ConfigError(
                f"batch_sampler={orders.name} gives no batches for a dataset of {size} samples: allowed is one or "
                "more. Make its batches smaller, or leave drop_last out."
            )
        largest = int(np.diff(order.bounds).max(initial=1))
        if batch not in (None, largest):
            raise ConfigError(
                f"global_batch_size={batch} does not fit batch_sampler={orders.name}, whose batches have up to "
                f"{largest} samples: each of them is the global batch of one step. Leave global_batch_size out, or "
                "give the DataLoader the sampler without its batches."
            )
        batch = largest
    assert batch is not None
    digest = f"{order.digest():016x}"
    held = "" if loader.generator is None else f" generator={loader.generator.initial_seed()}"
    plan = DataPlan(
        dataset_size=size,
        global_batch_size=batch,
        shuffle=False,
        drop_last=loader.drop_last,
        seed=seed,
        sampler=f"{orders.name} {digest}{held}",
    ).ordered_by(orders)
    return plan


def dataset_size(dataset: Dataset) -> int:
    """Number of samples.

    Raises:
        ConfigError: it has no length.
    """
    if isinstance(dataset, IterableDataset):
        raise refuse("stream", type(dataset).__name__)
    if not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"dataset={type(dataset).__name__} has no length: allowed are map-style datasets with __len__ and "
            "__getitem__, since samples are dealt out by index. Give it both, or read it into a list first."
        )
    size = len(dataset)
    if size == 0:
        raise ConfigError(f"dataset={type(dataset).__name__} is empty: it needs at least one sample.")
    return size
