"""One member sends the same bytes to some others."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raytrain_het.allreduce.transport.group import Group, Operation, PeerBuffers


def one_to_all(
    group: Group, source: int, receivers: list[int], data: torch.Tensor, finish: Callable[[Operation], None]
) -> None:
    """Send ``data`` (uint8) from one rank to some. On the receivers it is filled; elsewhere it does not matter.

    Args:
        group: the generation's; all members call this.
        source: the rank that sends.
        receivers: the ranks that receive.
        data: what is sent, or where it lands.
        finish: waits for an operation.
    """
    none = PeerBuffers(torch.zeros(0, dtype=torch.uint8, device=group.device), [0] * group.size)
    if group.rank == source:
        finish(group.all_to_all(none, PeerBuffers.copies(data.to(group.device), receivers, group.size)))
    elif group.rank in receivers:
        landed = data if data.device == group.device else data.to(group.device)
        lengths = [landed.numel() if rank == source else 0 for rank in range(group.size)]
        finish(group.all_to_all(PeerBuffers(landed, lengths), none))
        data.copy_(landed)
    else:
        finish(group.all_to_all(none, none))
