"""What every kind of reducer does for one bucket."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import torch

from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.transport.group import Operation

SendBuffer = tuple[int, int, torch.Tensor]
"""Elements ``start`` to ``stop`` of a bucket, and their place (stop - start,) in the message that takes them to their
owner. A gradient that is written there needs no encoding and no copy."""


class BucketReducer(Protocol):
    """One bucket's weighted all-reduce, in one generation: from local gradients to their mean on all members.

    *Threads.* The communication thread makes a reducer and calls its methods. The training thread writes into
    :meth:`send_buffers`, from the moment in which a step's result is published until it hands the bucket over.

    *Order.* In each step: :meth:`expect_step` once, then :meth:`all_reduce`, whose operations are launched in the same
    order by all members, then :meth:`decode`, as often as needed until the next step's :meth:`all_reduce`.

    *Buffers.* Messages lie in buffers that the reducer makes once and uses in every step. They are not zeroed: that
    would take 20 MB of memory traffic for a million parameters, while peers wait for a new generation. What the owners
    have sent stays there until the next step, so a member that is one step behind can be given it.
    """

    @property
    def owned(self) -> tuple[int, int]:
        """(start, stop) of the elements whose mean this member encodes."""

    @property
    def gradient_bytes(self) -> int:
        """Bytes of this member's gradient of the bucket on the wire, sent once."""

    def send_buffers(self) -> list[SendBuffer] | None:
        """Where a local gradient can be gathered so that nothing is left to encode; None if it must be encoded."""

    def expect_step(self) -> None:
        """A step is opened. What peers send for it is received from now on, whenever this member is ready itself."""

    def all_reduce(
        self, header: Header, local: torch.Tensor | None, weight: float
    ) -> Generator[Operation, None, Header]:
        """Reduce the bucket, by operations with the peers.

        Each operation that is yielded has been launched, and must be over before the next one is asked for.

        Args:
            header: what this member says of its gradient.
            local: the weighted gradient (n,), which may be changed; None where it was gathered in
                :meth:`send_buffers`, or this member sends nothing.
            weight: the sum of weights that the sum will be divided by, as far as it is known; 1 where it is not.

        Returns:
            What all members say together, the same on all of them.

        Raises:
            ProtocolError: a peer is at another step or bucket, or a payload does not decode.
        """

    def decode(self, out: torch.Tensor) -> None:
        """Write the mean into ``out`` (n,): the same bits on all members."""
