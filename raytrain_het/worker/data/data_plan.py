"""Which samples a step uses: a pure function of the plan, the cursor and the shares.

Nobody owns a part of the data. A step's global batch is a window of the epoch's permutation, and each member takes a
contiguous slice of that window, so when members come and go the next window is cut anew and no sample is lost.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raytrain_het.balance.batch_shares import apportion
from raytrain_het.errors import ConfigError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.worker.data.epoch_order import EpochOrder, Orders


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """The order in which a run uses a dataset, and how it is cut into global batches.

    Without a sampler every sample is used once an epoch, ``global_batch_size`` a step. With one (`ordered_by`) an epoch
    is what the sampler says: any number of entries, another number in another epoch, cut into steps of
    ``global_batch_size`` or where the sampler cuts it.

    Raises:
        ConfigError: a size is not a whole number from 1, the seed is negative, or ``drop_last`` would leave no step.
    """

    dataset_size: int
    """N, samples in the dataset."""

    global_batch_size: int
    """B, samples a step over all members; the largest batch of epoch 0 where a sampler gives the batches."""

    shuffle: bool
    """Whether each epoch has its own random order. Otherwise samples are used in index order."""

    drop_last: bool
    """Whether the ``N mod B`` samples at an epoch's end are left out. Otherwise the last step is smaller."""

    seed: int
    """Seed of the order, from 0; the same on all members."""

    sampler: str = ""
    """Names the sampler that gives the order, with a digest of its epoch 0; "" is the run's own order."""

    def __post_init__(self) -> None:
        for field, low in (("dataset_size", 1), ("global_batch_size", 1), ("seed", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{field}={value!r} is not valid: allowed is a whole number from {low}.")
        if self.drop_last and self.dataset_size < self.global_batch_size and not self.sampler:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} with drop_last=True leaves no step in an epoch of "
                f"{self.dataset_size} samples. Write drop_last=False, or global_batch_size={self.dataset_size} or less."
            )
        # Not fields: they are neither compared nor checkpointed.
        for name in ("_recent", "_num_used"):
            object.__setattr__(self, name, {})
        object.__setattr__(self, "_orders", None)

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in (*(f.name for f in dataclasses.fields(self)), "_orders")}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in (*state.items(), ("_recent", {}), ("_num_used", {})):
            object.__setattr__(self, name, value)

    def ordered_by(self, orders: Orders) -> DataPlan:
        """The same plan with epochs as a sampler orders them; ``sampler`` must name it."""
        plan = dataclasses.replace(self)
        object.__setattr__(plan, "_orders", orders)
        return plan

    @property
    def has_sampler(self) -> bool:
        """Whether a sampler gives the order."""
        return self._orders is not None  # type: ignore[attr-defined]

    @property
    def steps_per_epoch(self) -> int:
        """``floor(N / B)`` with ``drop_last``, else ``ceil(N / B)``; at least 1. With a sampler: those of epoch 0."""
        return self.steps_in(0)

    def steps_in(self, epoch: int) -> int:
        """Steps of one epoch."""
        bounds = self._bounds(epoch)
        if bounds is not None:
            return len(bounds) - 1
        full, rest = divmod(self.epoch_size(epoch), self.global_batch_size)
        return full if self.drop_last or rest == 0 else full + 1

    def epoch_size(self, epoch: int) -> int:
        """Entries of one epoch's order, those that ``drop_last`` leaves out included: N, or what the sampler gives."""
        return len(self._order(epoch).indices) if self.sampler else self.dataset_size

    @property
    def full_batch(self) -> int:
        """Samples of every step but perhaps an epoch's last, ``min(B, N)``; where a sampler cuts, the commonest number
        in epoch 0."""
        if not self.sampler:
            return min(self.global_batch_size, self.dataset_size)
        full: int | None = getattr(self, "_full_batch", None)
        if full is None:
            bounds = self._bounds(0)
            full = min(self.global_batch_size, self.epoch_size(0))
            if bounds is not None:
                sizes, counts = np.unique(np.diff(bounds), return_counts=True)
                full = int(sizes[counts == counts.max()].max())
            object.__setattr__(self, "_full_batch", full)
        return full

    def batch_at(self, cursor: Cursor) -> range:
        """The global batch that the cursor stands before, as offsets in the epoch's permutation.

        ``[offset, min(offset + B, N))``, or up to where the sampler cuts next. It is empty (beginning at the cursor's
        offset) when the epoch is over: at its end, or with ``drop_last`` where fewer than B samples are left.
        """
        bounds = self._bounds(cursor.epoch)
        if bounds is not None:
            after = int(np.searchsorted(bounds, cursor.offset, side="right"))
            stop = int(bounds[min(after, len(bounds) - 1)])
        else:
            stop = min(cursor.offset + self.global_batch_size, self.epoch_size(cursor.epoch))
            if self.drop_last and stop - cursor.offset < self.global_batch_size:
                stop = cursor.offset
        return range(cursor.offset, max(stop, cursor.offset))

    def is_epoch_end(self, cursor: Cursor) -> bool:
        """Whether no step is left in the cursor's epoch."""
        return len(self.batch_at(cursor)) == 0

    def advance(self, cursor: Cursor) -> Cursor:
        """The cursor after its step was committed. At an epoch's end it stays there until `next_epoch`.

        Raises:
            ValueError: the epoch is over, there was no step to commit.
        """
        batch = self.batch_at(cursor)
        if not batch:
            raise ValueError(f"{cursor} is at the end of its epoch: call next_epoch before another step.")
        return Cursor(epoch=cursor.epoch, offset=batch.stop, step=cursor.step + 1)

    def next_epoch(self, cursor: Cursor) -> Cursor:
        """The start of the following epoch; the step count goes on."""
        return Cursor(epoch=cursor.epoch + 1, offset=0, step=cursor.step)

    def resumed(self, cursor: Cursor) -> Cursor:
        """Where a run with this plan goes on from a checkpoint's cursor, which may be that of another batch size.

        It stays, and the rest of the epoch is cut anew; at the next epoch's start if no step is left in this one.
        """
        return self.next_epoch(cursor) if self.is_epoch_end(cursor) else cursor

    def progress(self, cursor: Cursor) -> float:
        """Epochs up to the cursor, with the part of the one under way."""
        return cursor.epoch + cursor.offset / self.epoch_size(cursor.epoch)

    def samples_before(self, cursor: Cursor) -> int:
        """Samples that all committed steps up to the cursor have used, over all members.

        With a sampler, epochs that this process has not seen count as the first one that it has: it is for people, and
        a worker that comes late does not go through all epochs before for it.
        """
        if not self.sampler:
            return cursor.epoch * self._used_of(self.dataset_size) + cursor.offset
        known: dict[int, int] = self._num_used  # type: ignore[attr-defined]
        if not known:
            self._order(cursor.epoch)
        usual = known[min(known)]
        return sum(known.get(epoch, usual) for epoch in range(cursor.epoch)) + cursor.offset

    def _used_of(self, size: int) -> int:
        return size - size % self.global_batch_size if self.drop_last else size

    def permutation(self, epoch: int) -> np.ndarray:
        """Dataset indices in the epoch's order: int64, shape ``[epoch_size]``, read-only.

        A function of (seed, epoch, dataset_size) that is the same on every platform and with every version of numpy; or
        what the sampler gives. The last two epochs asked for are kept.
        """
        return self._order(epoch).indices

    def repeats(self, epoch: int) -> np.ndarray | None:
        """How often each entry's index was there before it in the epoch: int64, ``[epoch_size]``; None if no index is
        there twice."""
        return self._kept(epoch, "repeats", lambda order: order.repeats()) if self.sampler else None

    def order_digest(self, epoch: int) -> int:
        """63 bits of the epoch's indices and of where it is cut: the same on all workers, or they use other samples."""
        return self._kept(epoch, "digest", lambda order: order.digest(self.global_batch_size, self.drop_last))

    def begin_epoch(self, epoch: int) -> None:
        """Ask the sampler for the epoch's order anew: what it depends on may have been set since it was asked.

        Raises:
            ConfigError: the number of samples, or of those in a step, is another one now. Workers that come in the
                middle of the epoch count its steps before they get to the line that changes it.
        """
        if not self.has_sampler:
            return
        before = self._recent.get(epoch)  # type: ignore[attr-defined]
        now = self._order(epoch, anew=True)
        if before is not None and not _cut_alike(before[0], now):
            raise ConfigError(
                f"sampler={self.sampler.split()[0]}: epoch {epoch} had {_steps(before[0])} before the body of the loop "
                f"over loader.epochs() and has {_steps(now)} now. What changes the number of samples must follow from "
                "the epoch alone, so that a worker that comes late knows it: give the sampler a method "
                "set_epoch(self, epoch) that sets it, which the loader calls."
            )

    def _bounds(self, epoch: int) -> np.ndarray | None:
        return self._order(epoch).bounds if self.sampler else None

    def _kept(self, epoch: int, what: str, make: Callable[[EpochOrder], Any]) -> Any:
        order = self._order(epoch)
        notes = self._recent[epoch][1]  # type: ignore[attr-defined]
        if what not in notes:
            notes[what] = make(order)
        return notes[what]

    def _order(self, epoch: int, *, anew: bool = False) -> EpochOrder:
        recent: dict[int, tuple[EpochOrder, dict[str, Any]]] = self._recent  # type: ignore[attr-defined]
        entry = None if anew else recent.get(epoch)
        if entry is None:
            order = self._make_order(epoch)
            order.indices.flags.writeable = False
            recent.pop(epoch, None)
            while len(recent) >= 2:
                recent.pop(next(iter(recent)), None)
            entry = recent[epoch] = order, {}
            used = self._used_of(len(order.indices)) if order.bounds is None else int(order.bounds[-1])
            self._num_used[epoch] = used  # type: ignore[attr-defined]
        return entry[0]

    def _make_order(self, epoch: int) -> EpochOrder:
        if self.sampler:
            orders: Orders | None = self._orders  # type: ignore[attr-defined]
            if orders is None:
                raise ValueError(f"the order of sampler={self.sampler!r} is known to the plan of its loader only.")
            return orders.order(epoch)
        if not self.shuffle:
            return EpochOrder(indices=np.arange(self.dataset_size, dtype=np.int64))
        # Not Generator.permutation: numpy may change its stream between versions, and two members with
        # different versions would use some samples twice. PCG64's raw bits and SeedSequence are guaranteed.
        bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
        # Sort random numbers whose low bits are the index: faster than argsort, and as no two of them are
        # equal the result cannot depend on the sorting algorithm, which differs between processors.
        low_bits = np.uint64((1 << self.dataset_size.bit_length()) - 1)
        keys = bits.random_raw(self.dataset_size) & ~low_bits | np.arange(self.dataset_size, dtype=np.uint64)
        keys.sort()
        return EpochOrder(indices=(keys & low_bits).astype(np.int64))


def _cut_alike(one: EpochOrder, other: EpochOrder) -> bool:
    if one.bounds is None or other.bounds is None:
        return len(one.indices) == len(other.indices)
    return np.array_equal(one.bounds, other.bounds)


def _steps(order: EpochOrder) -> str:
    steps = "" if order.bounds is None else f" in {len(order.bounds) - 1} batches"
    return f"{len(order.indices)} samples{steps}"


def slice_of(batch: range, shares: Sequence[float], member: int) -> range:
    """The part of a global batch that one member takes: contiguous, in member order, sized by `apportion`.

    Args:
        batch: offsets from `DataPlan.batch_at`.
        shares: one weight per member; the slices of all members tile ``batch``.
        member: index into ``shares``.

    Raises:
        ValueError: see `apportion`.
        IndexError: there is no such member.
    """
    if not 0 <= member < len(shares):
        raise IndexError(f"member={member} is not one of {len(shares)} members.")
    counts = _counts(len(batch), tuple(shares))
    start = batch.start + sum(counts[:member])
    return range(start, start + counts[member])


@functools.lru_cache(maxsize=64)
def _counts(total: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    # The same at nearly every step.
    return tuple(apportion(total, shares))


def micro_batches(slice: range, size: int | None, *, least: int = 1) -> list[range]:
    """Cut a slice into the fewest contiguous parts of at most ``size`` samples, the parts differing by at most one.

    Args:
        slice: offsets from `slice_of`.
        size: most samples in a part; ``None`` is no limit.
        least: no part has fewer, unless the slice has: there may be fewer parts for that, larger than ``size``.

    Returns:
        The parts in order, the longer ones first. None at all for an empty slice.

    Raises:
        ValueError: ``size`` is below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size!r} is not valid: a micro-batch has at least 1 sample.")
    if not slice:
        return []
    num_parts = 1 if size is None else max(1, min(-(-len(slice) // size), len(slice) // least))
    short, num_longer = divmod(len(slice), num_parts)
    parts, start = [], slice.start
    for index in range(num_parts):
        stop = start + short + (index < num_longer)
        parts.append(range(start, stop))
        start = stop
    return parts
