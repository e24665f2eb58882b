"""Slow processes: under a CPU quota of the kernel where this user may set one, else by stopping and continuing them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raytrain_het.probing.profile_store import keep_nothing
from raytrain_het.testing import stop_and_go
from raytrain_het.testing.cgroups import CpuQuota, LabError, check_cores, join, quotas


class StopAndGo:
    """Slows processes down without root: together they get ``cores`` of a core, since they are stopped again and again.

    It works as :class:`~raytrain_het.testing.cgroups.CpuQuota`, with two differences: processes that they start are not
    slow, and a SIGSTOP from elsewhere is undone. When this process ends, in whatever way, they run at full speed.

    Args:
        cores: Above 0; :meth:`set` changes it while they run.

    Raises:
        LabError: The system has no file descriptors for processes (Linux has them from 5.3 on).
    """

    how = "by stopping and continuing it, since this user may set no CPU quotas"

    def __init__(self, cores: float) -> None:
        check_cores(cores)
        if not hasattr(os, "pidfd_open"):
            raise LabError("processes cannot be slowed down here: that needs Linux 5.3 or newer.")
        command = [sys.executable, "-I", "-S", stop_and_go.__file__, str(os.getpid())]
        # The helper has a session of its own: Ctrl-C does not reach it. It ends with this process.
        self._helper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, bufsize=0)
        self.set(cores)

    def set(self, cores: float) -> None:
        """Change how many cores the processes get together."""
        check_cores(cores)
        self._order(f"cores {cores!r}")
        self.cores = cores

    def add(self, pid: int) -> None:
        """Slow a process down, with all its threads."""
        os.kill(pid, 0)
        self._order(f"add {pid}")

    def close(self) -> None:
        """Let the processes run at full speed."""
        assert self._helper.stdin is not None
        self._helper.stdin.close()
        self._helper.wait()

    def _order(self, line: str) -> None:
        assert self._helper.stdin is not None
        try:
            self._helper.stdin.write(f"{line}\n".encode())
        except BrokenPipeError:
            raise LabError("the process that slows others down is gone: they run at full speed.") from None


def throttle(cores: float) -> CpuQuota | StopAndGo:
    """The best way to slow processes down on this machine: ``add(pid)`` each process, and ``close()`` it at the end.

    Args:
        cores: How much of a core the processes get together; above 0.
    """
    try:
        return CpuQuota(cores)
    except LabError:
        return StopAndGo(cores)


@dataclass(frozen=True)
class SlowWorkers:
    """A call in a worker slows it down, to one torch thread and its part of a core. Picklable."""

    cores: tuple[float, ...]
    """By world rank."""
    groups: tuple[Path, ...] | None
    """The control groups of the quotas; None stops and continues the workers instead."""

    @property
    def how(self) -> str:
        """How workers are slowed, for people."""
        return StopAndGo.how if self.groups is None else CpuQuota.how

    def __call__(self, rank: int) -> None:
        import torch

        torch.set_num_threads(1)
        if self.groups is not None:
            join(self.groups[rank], os.getpid())
        else:
            keep_nothing()  # A worker that is stopped again and again measures its machine at full speed.
            _own.append(StopAndGo(self.cores[rank]))
            _own[-1].add(os.getpid())


_own: list[StopAndGo] = []
"""Of this process: they must live as long as it does."""


@contextlib.contextmanager
def slow_workers(cores: Sequence[float]) -> Iterator[SlowWorkers]:
    """Slow down the workers of a run on this machine, for the length of the block. Every worker calls the result
    first."""
    with contextlib.ExitStack() as stack:
        try:
            groups = tuple(quota.path for quota in stack.enter_context(quotas(list(cores))))
        except LabError:
            groups = None
        yield SlowWorkers(tuple(cores), groups)
