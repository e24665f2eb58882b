"""What a generation's members do together: operations on bytes, among all, in one order.

Two kinds: :mod:`raytrain_het.collectives.tcp` on the CPU, and :mod:`raytrain_het.collectives.nccl` on GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from raytrain_het.collectives.poller import Poller


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

    def expect(self, out: torch.Tensor, splits: Sequence[int]) -> Any:
        """Be ready for an all-to-all that this member launches later: rank ``i``'s message lands in its part of
        ``out``.

        Operations are expected, or else launched, in the same order by all.
        """

    def all_to_all(
        self, out: torch.Tensor, inp: torch.Tensor, outs: Sequence[int], ins: Sequence[int], expected: Any = None,
        *, flush: bool = True,
    ) -> Operation:  # fmt: skip
        """Uneven all-to-all of uint8: rank ``i``'s part of ``inp`` goes to ``i``; its message lands in its part of
        ``out``.

        Args:
            out: where messages land.
            inp: what is sent, in rank order.
            outs: bytes from each rank.
            ins: bytes to each rank.
            expected: what :meth:`expect` returned for it.
            flush: whether it is done only when all is sent. If not, ``inp`` must stay as it is until it is.

        Raises:
            GroupError: a peer is gone.
        """

    def sent(self) -> dict[int, tuple[int, float]]:
        """By rank: bytes that have reached it so far, and seconds for which there were some on the way that it had room
        for; empty where that is not known."""

    def all_gather(
        self,
        out: torch.Tensor,
        inp: torch.Tensor,
        outs: Sequence[int],
        receivers: Sequence[int],
        *,
        flush: bool = False,
    ) -> Operation:
        """``inp`` goes to all receivers (this rank is none); rank ``i``'s message lands in its part of ``out``.

        One of the order as an all-to-all is, and with the same arguments: some members may launch that instead.
        """
