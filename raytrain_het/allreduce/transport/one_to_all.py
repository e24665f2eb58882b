"""One member sends the same bytes to some others."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raytrain_het.allreduce.transport.group import Group, Operation, PeerBuffers


def one_to_all(
    group: Group, source: int, receivers: list[int], data: torch.Tensor, launch: Callable[[Operation], None]
) -> None:
    """Send ``data`` (uint8) from one rank to some; on the receivers it is filled, elsewhere only its size matters."""
    none = PeerBuffers(torch.zeros(0, dtype=torch.uint8, device=group.device), [0] * group.size)
    if group.rank == source:
        launch(group.all_to_all(none, PeerBuffers.copies(data.to(group.device), receivers, group.size)))
    elif group.rank in receivers:
        landed = data if data.device == group.device else data.to(group.device)
        lengths = [landed.numel() if rank == source else 0 for rank in range(group.size)]
        launch(group.all_to_all(PeerBuffers(landed, lengths), none))
        data.copy_(landed)
    else:
        launch(group.all_to_all(none, none))
