"""Which samples a step uses: a pure function of the plan, the cursor and the shares.

Nobody owns a part of the data. A step's global batch is a window of the epoch's permutation, and each member takes a
contiguous slice of that window, so when members come and go the next window is cut anew and no sample is lost.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raytrain_het.allocation.batch_shares import apportion
from raytrain_het.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a run stands. It moves only when a step commits; it heals and is checkpointed with the model."""

    epoch: int = 0
    """The epoch under way, from 0."""

    offset: int = 0
    """How many entries of the epoch's permutation are used up: where the next global batch begins."""

    step: int = 0
    """Steps committed since the run began, over all epochs: the number of the next step."""

    def to_dict(self) -> dict[str, int]:
        """The fields as plain whole numbers, for a checkpoint or a message."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, int]) -> Cursor:
        """The cursor that `to_dict` described.

        Raises:
            KeyError: a field is missing.
        """
        return cls(**{f.name: int(fields[f.name]) for f in dataclasses.fields(cls)})


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """The order in which a run uses a dataset: every sample once an epoch, ``global_batch_size`` a step.

    Raises:
        ConfigError: a size is not a whole number from 1, the seed is negative, or ``drop_last`` would leave no step.
    """

    dataset_size: int
    """N, samples in the dataset."""

    global_batch_size: int
    """B, samples a step over all members."""

    shuffle: bool
    """Whether each epoch has its own random order. Otherwise samples are used in index order."""

    drop_last: bool
    """Whether the ``N mod B`` samples at an epoch's end are left out. Otherwise the last step is smaller."""

    seed: int
    """Seed of the order, from 0; the same on all members."""

    def __post_init__(self) -> None:
        for field, low in (("dataset_size", 1), ("global_batch_size", 1), ("seed", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{field}={value!r} is not valid: allowed is a whole number from {low}.")
        if self.drop_last and self.dataset_size < self.global_batch_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} with drop_last=True leaves no step in an epoch of "
                f"{self.dataset_size} samples. Write drop_last=False, or global_batch_size={self.dataset_size} or less."
            )
        # Not a field: it is neither compared nor checkpointed nor sent.
        object.__setattr__(self, "_recent_permutations", {})

    def __getstate__(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in (*state.items(), ("_recent_permutations", {})):
            object.__setattr__(self, name, value)

    @property
    def steps_per_epoch(self) -> int:
        """``floor(N / B)`` with ``drop_last``, else ``ceil(N / B)``; at least 1."""
        full, rest = divmod(self.dataset_size, self.global_batch_size)
        return full if self.drop_last or rest == 0 else full + 1

    @property
    def full_batch(self) -> int:
        """``min(B, N)``, samples of every step but perhaps an epoch's last."""
        return min(self.global_batch_size, self.dataset_size)

    def batch_at(self, cursor: Cursor) -> range:
        """The global batch that the cursor stands before, as offsets in the epoch's permutation.

        ``[offset, min(offset + B, N))``. It is empty (beginning at the cursor's offset) when the epoch is over: at its
        end, or with ``drop_last`` where fewer than B samples are left.
        """
        stop = min(cursor.offset + self.global_batch_size, self.dataset_size)
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

    def samples_before(self, cursor: Cursor) -> int:
        """Samples that all committed steps up to the cursor have used, over all members."""
        per_epoch = self.dataset_size
        if self.drop_last:
            per_epoch -= self.dataset_size % self.global_batch_size
        return cursor.epoch * per_epoch + cursor.offset

    def permutation(self, epoch: int) -> np.ndarray:
        """Dataset indices in the epoch's order: int64, shape ``[dataset_size]``, read-only.

        A function of (seed, epoch, dataset_size) that is the same on every platform and with every version of numpy.
        The last two epochs asked for are kept.
        """
        recent: dict[int, np.ndarray] = self._recent_permutations  # type: ignore[attr-defined]
        order = recent.get(epoch)
        if order is None:
            if self.shuffle:
                # Not Generator.permutation: numpy may change its stream between versions, and two members with
                # different versions would use some samples twice. PCG64's raw bits and SeedSequence are guaranteed.
                bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
                # Sort random numbers whose low bits are the index: faster than argsort, and as no two of them are
                # equal the result cannot depend on the sorting algorithm, which differs between processors.
                low_bits = np.uint64((1 << self.dataset_size.bit_length()) - 1)
                keys = bits.random_raw(self.dataset_size) & ~low_bits | np.arange(self.dataset_size, dtype=np.uint64)
                keys.sort()
                order = (keys & low_bits).astype(np.int64)
            else:
                order = np.arange(self.dataset_size, dtype=np.int64)
            order.flags.writeable = False
            while len(recent) >= 2:
                recent.pop(next(iter(recent)))
            recent[epoch] = order
        return order


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
