"""What a generation's members do together: operations on bytes, among all, in one order.

Two kinds: TCP on the CPU (``tcp.py``), and NCCL on GPUs (``nccl.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch

from raytrain_het.allreduce.transport.poller import Poller


class GroupError(RuntimeError):
    """A collective, or the making of a group, has failed: a peer is gone, or a link to it."""


class Operation(Protocol):
    """One collective under way. Keeps its tensors alive until it ends."""

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""

    def result(self) -> None:
        """Raises:
        GroupError: it failed.
        """


class Parts:
    """A message buffer, cut into one part for each rank. To be made once where it is used at every step.

    Args:
        buffer: (sum of ``lengths``,) uint8; see also :meth:`copies`.
        lengths: bytes to or from each rank, in rank order.
    """

    def __init__(self, buffer: torch.Tensor, lengths: Sequence[int]) -> None:
        self.buffer, self.lengths = buffer, list(lengths)
        self._num_copies: int | None = None

    @classmethod
    def copies(cls, buffer: torch.Tensor, ranks: Collection[int], size: int) -> Parts:
        """To be sent: all of the buffer to each of ``ranks``, and nothing to the others of a group of this size."""
        parts = cls(buffer, [buffer.numel() if rank in ranks else 0 for rank in range(size)])
        parts._num_copies = len(ranks)
        return parts

    def spread(self, ranks: Sequence[int], size: int) -> Parts:
        """The same message, to or from these ranks, in order, of a group of this size: it was made for a group of them
        alone."""
        lengths = [0] * size
        for rank, length in zip(ranks, self.lengths, strict=True):
            lengths[rank] = length
        parts = Parts(self.buffer, lengths)
        parts._num_copies = self._num_copies
        return parts

    def in_a_row(self) -> torch.Tensor:
        """All parts one after the other: the buffer itself, unless it goes to nobody or to several."""
        return self.buffer if self._num_copies in (None, 1) else self.buffer.repeat(self._num_copies)

    @cached_property
    def views(self) -> list[memoryview]:
        """By rank: the bytes of its part, in the memory of a CPU."""
        whole: memoryview = self.buffer.numpy().data
        if self._num_copies is not None:
            return [whole[:length] for length in self.lengths]
        views, place = [], 0
        for length in self.lengths:
            views.append(whole[place : place + length])
            place += length
        return views


class Group(Protocol):
    """A group of a generation's members. For one thread, the one that waits at the poller."""

    key: str
    rank: int
    size: int
    device: torch.device
    """Where messages are."""
    poll_s: float | None
    """How often a waiting thread has to look whether an operation is done; None if it is told."""

    def join(self, poller: Poller) -> None:
        """From now on whoever waits there serves this group."""

    def leave(self) -> None:
        """Drop the group at once. What is under way is over for this member, and its buffers are left alone."""

    def expect(self, out: Parts) -> Any:
        """Be ready for an all-to-all that this member launches later: rank ``i``'s message lands in its part of
        ``out``.

        Operations are expected, or else launched, in the same order by all.
        """

    def all_to_all(self, out: Parts, inp: Parts, expected: Any = None, *, flush: bool = True) -> Operation:
        """Uneven all-to-all of uint8: rank ``i``'s part of ``inp`` goes to ``i``; its message lands in its part of
        ``out``.

        Args:
            out: where messages land.
            inp: what is sent.
            expected: what :meth:`expect` returned for it.
            flush: whether it is done only when all is sent. If not, ``inp`` must stay as it is until it is.

        Raises:
            GroupError: a peer is gone.
        """

    def sent(self) -> dict[int, tuple[int, float]]:
        """By rank: bytes that have reached it so far, and seconds for which there were some on the way that it had room
        for; empty where that is not known."""
