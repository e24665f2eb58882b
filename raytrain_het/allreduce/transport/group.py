"""What a generation's members do together: operations on bytes among all of them, in one order.

There are two kinds of groups: TCP on the CPU (``tcp.py``), and NCCL on GPUs (``nccl.py``). Only the communication
thread calls a group.
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


class PeerBuffers:
    """The messages to all peers of a group, or from all, in one buffer. Make it once for an operation of every step.

    Args:
        buffer: (sum of ``lengths``,) uint8, one part after the other; see also :meth:`copies`.
        lengths: bytes to or from each rank, in rank order.
    """

    def __init__(self, buffer: torch.Tensor, lengths: Sequence[int]) -> None:
        self.buffer, self.lengths = buffer, list(lengths)
        self._num_copies: int | None = None

    @classmethod
    def copies(cls, buffer: torch.Tensor, ranks: Collection[int], size: int) -> PeerBuffers:
        """To send all of the buffer to each of ``ranks``, and nothing to the others of a group of this size."""
        buffers = cls(buffer, [buffer.numel() if rank in ranks else 0 for rank in range(size)])
        buffers._num_copies = len(ranks)
        return buffers

    def in_larger_group(self, ranks: Sequence[int], size: int) -> PeerBuffers:
        """The same messages, in the same memory, for a group of which these peers are a part.

        Args:
            ranks: of these peers in the larger group, in the order of their ranks here.
            size: members of the larger group.
        """
        lengths = [0] * size
        for rank, length in zip(ranks, self.lengths, strict=True):
            lengths[rank] = length
        buffers = PeerBuffers(self.buffer, lengths)
        buffers._num_copies = self._num_copies
        return buffers

    def in_a_row(self) -> torch.Tensor:
        """All messages one after the other: the buffer itself, unless all of it goes to nobody or to several peers."""
        return self.buffer if self._num_copies in (None, 1) else self.buffer.repeat(self._num_copies)

    @cached_property
    def views(self) -> list[memoryview]:
        """By rank: the bytes of its message, in the memory of a CPU."""
        whole: memoryview = self.buffer.numpy().data
        if self._num_copies is not None:
            return [whole[:length] for length in self.lengths]
        views, place = [], 0
        for length in self.lengths:
            views.append(whole[place : place + length])
            place += length
        return views


class Group(Protocol):
    """A group of a generation's members, called by one thread: the one that waits at the poller."""

    key: str
    rank: int
    size: int
    device: torch.device
    """Where messages are."""
    poll_s: float | None
    """How often a waiting thread must look whether an operation is done; None if the poller wakes it."""

    def join(self, poller: Poller) -> None:
        """From now on the thread that waits at this poller serves the group."""

    def leave(self) -> None:
        """Drop the group at once. Operations under way end for this member, and nothing writes into their buffers."""

    def expect(self, out: PeerBuffers) -> Any:
        """Be ready for an all-to-all that this member launches later: rank ``i``'s message lands in its part of
        ``out``.

        All members must expect operations, or launch those they did not expect, in the same order.
        """

    def all_to_all(self, out: PeerBuffers, inp: PeerBuffers, expected: Any = None, *, flush: bool = True) -> Operation:
        """Uneven all-to-all of uint8: rank ``i``'s part of ``inp`` goes to ``i``; its message lands in its part of
        ``out``.

        Args:
            out: where messages land.
            inp: what is sent.
            expected: what :meth:`expect` returned for it.
            flush: whether the operation is done only when all is sent. If not, ``inp`` must not change until then.

        Raises:
            GroupError: a peer is gone.
        """

    def sent(self) -> dict[int, tuple[int, float]]:
        """By rank: the bytes that have reached it so far, and the seconds for which some were on the way while it had
        room for them; empty where that is not known."""
