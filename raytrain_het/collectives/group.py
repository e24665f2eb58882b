"""Process groups that come and go with generations, and operations that can be abandoned.

An abandoned operation stays live: a stopped peer that wakes writes into its receive buffer. So its buffers and its
group belong to it until it ends, and a reaper thread drops them then (dropping a group that is stuck blocks until the
operation's time-out).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from raytrain_het.membership.meeting import Meeting

OPERATION_TIMEOUT = timedelta(minutes=30)
"""gloo's own; never what detects a failure."""


class GroupError(RuntimeError):
    """A collective, or the making of a group, has failed: a peer is gone, or a link to it."""


class Operation:
    """One collective under way. Keeps its tensors alive until it ends."""

    def __init__(self, work: dist.Work, tensors: tuple[torch.Tensor, ...], wake: Callable[[], None]) -> None:
        self._tensors = tensors
        self._future = work.get_future()
        self._future.add_done_callback(lambda _: wake())

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def result(self) -> None:
        """Raises:
        GroupError: it failed.
        """
        try:
            self._future.value()
        except RuntimeError as error:
            raise GroupError(str(error)) from error


class DeviceOperation(Operation):
    """The same under NCCL, whose futures are done when the work is queued: here the device is asked."""

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


class Group:
    """A process group of a generation's members: gloo with messages on the CPU, or NCCL with messages on the GPU."""

    poll_s: float | None = None
    """How often a waiting thread has to look whether an operation is done; None if it is told."""

    def __init__(
        self, key: str, pg: Any, rank: int, size: int, wake: Callable[[], None],
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.key, self.rank, self.size, self.device = key, rank, size, device or torch.device("cpu")
        self._pg: Any = pg
        self._wake = wake
        if self.device.type == "cuda":
            self.poll_s = 0.0005
        self._under_way: list[Operation] = []

    def all_to_all(
        self, out: torch.Tensor, inp: torch.Tensor, out_splits: list[int], in_splits: list[int]
    ) -> Operation:
        """Uneven all-to-all of uint8: rank ``i``'s part of ``inp`` goes to ``i``; its message lands in its part of
        ``out``."""
        assert self._pg is not None
        try:
            work = self._pg.alltoall_base(out, inp, out_splits, in_splits, dist.AllToAllOptions())
        except RuntimeError as error:
            raise GroupError(str(error)) from error
        tensors = (out, inp)
        operation = DeviceOperation(work, tensors) if self.poll_s else Operation(work, tensors, self._wake)
        self._under_way = [op for op in self._under_way if not op.done]
        self._under_way.append(operation)
        return operation

    @property
    def idle(self) -> bool:
        """Whether no operation is under way, so that dropping it does not block."""
        self._under_way = [op for op in self._under_way if not op.done]
        return not self._under_way

    def drop(self) -> None:
        """Free the group's threads and sockets."""
        self._pg = None

    def abandon(self) -> None:
        """Nobody waits for what is under way. gloo ends it by itself; under NCCL it would block the device for good."""
        if self.device.type == "cuda" and self._pg is not None and not self.idle:
            self._pg.abort()


class Reaper:
    """One thread that drops groups once nothing of theirs is under way."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._groups: list[Group] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="het-reaper", daemon=True)
        self._thread.start()

    def take(self, group: Group) -> None:
        """Own this group from now on."""
        group.abandon()
        with self._lock:
            self._groups.append(group)
            self._lock.notify()

    @property
    def num_waiting(self) -> int:
        """Groups that still have an operation under way."""
        with self._lock:
            return len(self._groups)

    def close(self) -> None:
        """Stop. Groups that are still stuck are left to the end of the process."""
        with self._lock:
            self._closed = True
            self._lock.notify()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._groups)
                if self._closed:
                    return
                idle = [g for g in self._groups if g.idle]
                self._groups = [g for g in self._groups if g not in idle]
                if not idle:
                    self._lock.wait(0.05)
            for group in idle:
                group.drop()


def make_group(
    key: str, store: dist.Store, rank: int, size: int, host: str, device: torch.device, wake: Callable[[], None]
) -> Group:
    """Meet the other members at the store. Blocks, even past its time-out if a member dies meanwhile."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return Group(
            key, dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options()), rank, size, wake, device
        )
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = OPERATION_TIMEOUT
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._threads = 2
    pg = dist.ProcessGroupGloo(store, rank, size, options)
    return Group(key, pg, rank, size, wake)


class GroupBuilder:
    """Makes a group in a helper thread, which is left to itself when the group is no longer wanted."""

    def __init__(
        self, reaper: Reaper, key: str, meeting: Meeting, rank: int, size: int, host: str, device: torch.device,
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self.group: Group | None = None
        self.error: Exception | None = None
        self._abandoned = False
        self._lock = threading.Lock()
        self._reaper, self._meeting, self._wake = reaper, meeting, wake
        self._make = functools.partial(make_group, key, meeting, rank, size, host, device, wake)
        threading.Thread(target=self._run, name="het-group", daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether there is a group or an error."""
        return self.group is not None or self.error is not None

    def abandon(self) -> None:
        """Nobody wants the group any more."""
        self._meeting.abandon()
        with self._lock:
            self._abandoned = True
            if self.group is not None:
                self._reaper.take(self.group)

    def _run(self) -> None:
        try:
            group = self._make()
        except Exception as error:
            self.error = error
        else:
            with self._lock:
                self.group = group
                if self._abandoned:
                    self._reaper.take(group)
        self._wake()
