"""What an evaluation goes through: chunks of held-out data, the same on every worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

from raytrain_het.errors import ConfigError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.worker.data.batches import pinned, to_device
from raytrain_het.worker.data.data_loader import HetDataLoader, dataset_size, plan_of
from raytrain_het.worker.data.data_plan import DataPlan
from raytrain_het.worker.data.fetch import SampleFetcher
from raytrain_het.worker.data.forked_generators import seeded
from raytrain_het.worker.data.sample_source import SampleSource
from raytrain_het.worker.data.sampler_orders import check_epoch
from raytrain_het.worker.data.whole_numbers import whole_number

BATCH_SIZE = 256
CollateFn = Callable[[list[Any]], Any]


class HeldOut:
    """Held-out data, cut into chunks.

    Args:
        data: a dataset, a ``DataLoader``, or the prepared training loader.
        batch_size: samples in a chunk; None is the ``DataLoader``'s, or 256.
        collate_fn: makes a batch of a chunk's samples; None is the ``DataLoader``'s, or ``default_collate_fn``.
        default_collate_fn: the training loader's, used if it can make a batch of these samples; else, torch's.
        seed: the run's.
        epoch: for a sampler that takes other samples in each.

    Raises:
        ConfigError, LoopOrderError: the data cannot be dealt out by index.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: Any,
        collate_fn: CollateFn | None,
        default_collate_fn: CollateFn | None,
        seed: int,
        epoch: int,
    ) -> None:
        self._pins = False
        if isinstance(data, DataLoader):
            if batch_size is not None or collate_fn is not None:
                raise ConfigError(
                    "evaluate() got a DataLoader and batch_size or collate_fn besides: give them to the DataLoader, or "
                    "write evaluate(fn, loader.dataset, batch_size=..., collate_fn=...)."
                )
            self.plan = plan_of(data, seed=seed)
            if self.plan.has_sampler:
                check_epoch(self.plan, dataset_size(data.dataset), epoch)
            self._fetcher = SampleFetcher.of(data, data.collate_fn, seed)
            self._pins = data.pin_memory
        else:
            if isinstance(data, HetDataLoader):
                data, collate_fn = data.dataset, collate_fn or data.collate_fn
            size = dataset_size(data)
            batch_size = whole_number(BATCH_SIZE if batch_size is None else batch_size, "batch_size={}")
            self.plan = DataPlan(
                dataset_size=size, global_batch_size=batch_size, shuffle=False, drop_last=False, seed=seed
            )
            collate_fn = collate_fn or _that_works(default_collate_fn, SampleSource(data, seed), size)
            self._fetcher = SampleFetcher(data, collate_fn, seed=seed)
        self._epoch = epoch
        self._chunks = list(_windows(self.plan, epoch))
        self.num_samples = sum(map(len, self._chunks))
        """Those that the chunks hold, each as often as it is in them."""

    @property
    def num_chunks(self) -> int:
        """How many there are."""
        return len(self._chunks)

    @property
    def key(self) -> str:
        """Tells evaluations of other data, or of other chunks, apart."""
        digest = self.plan.order_digest(self._epoch) & 0xFFFFFFFF
        return f"{self.num_samples} of {self.plan.dataset_size} in {self.num_chunks} chunks, {digest:08x}"

    def batch(self, chunk: int, device: torch.device) -> Any:
        """One chunk's batch."""
        window = slice(self._chunks[chunk].start, self._chunks[chunk].stop)
        repeats = self.plan.repeats(self._epoch)
        batch = self._fetcher.fetch(
            0,
            self.plan.permutation(self._epoch)[window].tolist(),
            None if repeats is None else repeats[window].tolist(),
        )
        return to_device(pinned(batch) if self._pins and device.type == "cuda" else batch, device)

    def close(self) -> None:
        """Let data processes go."""
        self._fetcher.close()


def _windows(plan: DataPlan, epoch: int) -> Iterator[range]:
    cursor = Cursor(epoch=epoch)
    while window := plan.batch_at(cursor):
        yield window
        cursor = plan.advance(cursor)


def _that_works(collate_fn: CollateFn | None, source: SampleSource, size: int) -> CollateFn | None:
    """The training loader's function, unless held-out samples are of another kind, which torch's can make a batch of.

    The same on every worker: it is tried on the same samples.
    """
    if collate_fn is None:
        return None
    with seeded(0):
        samples = source.fetch(0, sorted({0, size - 1}))
        try:
            collate_fn(samples)
        except Exception:
            with suppress(Exception):
                default_collate(samples)
                return default_collate
    return collate_fn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients; afterwards each of its modules has its own flag again."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        # By train(), since some modules do more then (merged weights are taken apart, say). Outer modules first: an
        # inner one may have had another flag.
        for module, training in before:
            if module.training != training:
                module.train(training)
        for module, training in before:
            module.training = training
