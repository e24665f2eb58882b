"""How many cores this process may really use: its affinity, and the CPU quota of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CpuLimit:
    """What the kernel lets this process have."""

    cores: float
    """The least of the affinity's cores and every quota above this process."""
    period_s: float
    """The longest period of these quotas; 0 without one. Within it a process may run at full speed for a while: what
    takes less than a period says nothing about the quota."""


def cpu_limit(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> CpuLimit:
    """The limit in force, of control groups version 1 and 2. Without Linux's files, all cores of the machine."""
    cores = float(_affinity())
    period_s = 0.0
    for folder in _groups(cgroups, membership):
        limit = _quota(folder)
        if limit is not None and limit.cores < _affinity():
            cores, period_s = min(cores, limit.cores), max(period_s, limit.period_s)
    return CpuLimit(cores, period_s)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _groups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's groups with all above them.

    In a container ``membership`` may name a path of the host, whose last part is mounted at the top: folders that do
    not exist are no error, and the top is always looked at.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = cgroups / controllers if controllers else cgroups
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            yield mount / folder


def _quota(folder: Path) -> CpuLimit | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        if quota == "max" or int(quota) <= 0:
            return None
        return CpuLimit(int(quota) / int(period), int(period) / 1e6)
    except (OSError, ValueError):
        return None
