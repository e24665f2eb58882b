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
    """Processes that together get ``cores`` of a core, without root: they are stopped for 10 ms again and again.

    As :class:`~raytrain_het.testing.cgroups.CpuQuota`, except that processes which they start are not slow, and that
    it undoes a SIGSTOP by somebody else. When this process ends, however it ends, they go on at full speed.

    Args:
        cores: above 0; may be changed while they run, with :meth:`set`.

    Raises:
        LabError: the system has no handles for processes (Linux has, from 5.3).
    """

    how = "by stopping and continuing it, since this user may set no CPU quotas"

    def __init__(self, cores: float) -> None:
        check_cores(cores)
        if not hasattr(os, "pidfd_open"):
            raise LabError("processes cannot be slowed down here: that needs Linux 5.3 or newer.")
        command = [sys.executable, "-I", "-S", stop_and_go.__file__, str(os.getpid())]
        # In a session of its own: Ctrl-C is not for it, it ends with this process.
        self._helper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, bufsize=0)
        self.set(cores)

    def set(self, cores: float) -> None:
        """From now on so many cores."""
        check_cores(cores)
        self._order(f"cores {cores!r}")
        self.cores = cores

    def add(self, pid: int) -> None:
        """Slow a process down, with all its threads."""
        os.kill(pid, 0)
        self._order(f"add {pid}")

    def close(self) -> None:
        """Let them go."""
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
    """What slows processes down here; ``add(pid)`` them, and ``close()`` it in the end.

    Args:
        cores: so much of a core they get together; above 0.
    """
    try:
        return CpuQuota(cores)
    except LabError:
        return StopAndGo(cores)


@dataclass(frozen=True)
class SlowWorkers:
    """Slows down the worker that calls it, from then on, to one torch thread and its part of a core. Picklable."""

    cores: tuple[float, ...]
    """By world rank."""
    groups: tuple[Path, ...] | None
    """The quotas' groups; None stops and continues instead."""

    @property
    def how(self) -> str:
        """For the reader."""
        return StopAndGo.how if self.groups is None else CpuQuota.how

    def __call__(self, rank: int) -> None:
        import torch

        torch.set_num_threads(1)
        if self.groups is not None:
            join(self.groups[rank], os.getpid())
        else:
            keep_nothing()  # Stopped now and again, it looks like a machine of full speed with long breaks.
            _own.append(StopAndGo(self.cores[rank]))
            _own[-1].add(os.getpid())


_own: list[StopAndGo] = []
"""Kept for as long as this process lives."""


@contextlib.contextmanager
def slow_workers(cores: Sequence[float]) -> Iterator[SlowWorkers]:
    """For a run on this machine, as long as the block: call the result in each worker, refilled ones too."""
    with contextlib.ExitStack() as stack:
        try:
            groups = tuple(quota.path for quota in stack.enter_context(quotas(list(cores))))
        except LabError:
            groups = None
        yield SlowWorkers(tuple(cores), groups)
