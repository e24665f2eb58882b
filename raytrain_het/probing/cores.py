"""How many cores this process may use, by its affinity and the CPU quotas of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CpuLimit:
    """The computing time that the kernel lets this process have."""

    cores: float
    """The least of the affinity's cores and every quota above this process."""
    period_s: float
    """The longest period of these quotas; 0 without one. A process may run at full speed for a part of a period, so
    work that is shorter than a period does not show the quota."""


def cpu_limit(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> CpuLimit:
    """The limit in force, by control groups of version 1 or 2. Without Linux's files it is all cores of the machine."""
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
    """The folders of this process's groups, and all folders above them.

    In a container ``membership`` may name a path of the host, whose last part is mounted at the top. So a folder that
    does not exist is no error, and the top is always among them.
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
