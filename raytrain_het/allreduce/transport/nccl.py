"""Groups on GPUs. Untested with several GPUs."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist

from raytrain_het.allreduce.transport.group import GroupError, PeerBuffers
from raytrain_het.allreduce.transport.poller import Poller


class NcclOperation:
    """One collective. NCCL's futures are done when the work is queued, so this asks the device."""

    def __init__(self, work: dist.Work, tensors: tuple[torch.Tensor, ...]) -> None:
        self._tensors, self._work = tensors, work

    @property
    def done(self) -> bool:
        """Whether the device has done it."""
        return bool(self._work.is_completed())

    def result(self) -> None:
        """Raises:
        GroupError: it failed.
        """
        try:
            self._work.wait()
        except RuntimeError as error:
            raise GroupError(str(error)) from error


class NcclGroup:
    """See :class:`raytrain_het.allreduce.transport.group.Group`."""

    poll_s: float | None = 0.0005

    def __init__(self, key: str, store: dist.Store, rank: int, size: int, device: torch.device) -> None:
        torch.cuda.set_device(device)
        self.key, self.rank, self.size, self.device = key, rank, size, device
        self._pg: Any = dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
        self._under_way: list[NcclOperation] = []

    def join(self, poller: Poller) -> None:
        """Nothing to do: a thread that waits looks every :attr:`poll_s`."""

    def leave(self) -> None:
        """Abort what is under way, which would block the device for good. A thread drops the group: that may block."""
        pg, self._pg = self._pg, None
        if any(not operation.done for operation in self._under_way):
            pg.abort()
        threading.Thread(target=pg.shutdown, name="het-drop", daemon=True).start()

    def expect(self, out: PeerBuffers) -> None:
        """Nothing to do: NCCL transfers nothing before both sides have launched."""

    def sent(self) -> dict[int, tuple[int, float]]:
        """Not known."""
        return {}

    def all_to_all(
        self, out: PeerBuffers, inp: PeerBuffers, expected: Any = None, *, flush: bool = True
    ) -> NcclOperation:
        """See :class:`raytrain_het.allreduce.transport.group.Group`."""
        sent = inp.in_a_row()
        try:
            work = self._pg.alltoall_base(out.buffer, sent, out.lengths, inp.lengths, dist.AllToAllOptions())
        except RuntimeError as error:
            raise GroupError(str(error)) from error
        operation = NcclOperation(work, (out.buffer, sent))
        self._under_way = [op for op in self._under_way if not op.done]
        self._under_way.append(operation)
        return operation
