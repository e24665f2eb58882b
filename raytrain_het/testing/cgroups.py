"""Slow machines on one machine: processes under a CPU quota of the kernel (Linux, as root)."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 10_000
"""Short, so that a slow process runs evenly: a tenth of a core is 1 ms in every 10."""
MIN_QUOTA_US = 1000
"""The least quota that the kernel takes: slower groups get a longer period."""
WEIGHT = 100
"""On a busy machine a group counts as so many processes: only its quota is meant to slow it."""
MIN_CORES = 0.01
"""At a lower speed no process answers in time."""
PREFIX = "raytrain_het_lab"
_GONE_WITHIN_S = 5.0


class LabError(RuntimeError):
    """A lab cannot be built on this machine; the message says what is missing."""


def available() -> bool:
    """Whether quotas can be set here."""
    return _controller() is not None and os.access(_controller() or ROOT, os.W_OK)


def _controller() -> Path | None:
    """The folder of the CPU controller, which version 1 of control groups has apart from others; None without one."""
    if (ROOT / "cpu" / "cpu.cfs_quota_us").exists():
        return ROOT / "cpu"
    try:
        return ROOT if "cpu" in (ROOT / "cgroup.controllers").read_text().split() else None
    except OSError:
        return None


class CpuQuota:
    """A group of processes that together get ``cores`` of a core. Processes that they start belong to it too.

    Args:
        cores: Above 0; :meth:`set` changes it while they run.
        kind: The end of the group's name.

    Raises:
        LabError: There is no CPU controller that this process may use.
    """

    how = "by a CPU quota of the kernel"

    def __init__(self, cores: float, *, kind: str = "") -> None:
        check_cores(cores)
        root = _controller()
        if root is None or not available():
            raise LabError(
                f"no CPU quotas here: {ROOT} has no cpu controller that this user may write to. Run as root on Linux, "
                "outside of a container or in a privileged one."
            )
        self._v2 = root == ROOT
        _remove_leftovers()
        self.path = root / f"{PREFIX}_{os.getpid()}_{secrets.token_hex(3)}{kind and '_'}{kind}"
        try:
            if self._v2:
                (root / "cgroup.subtree_control").write_text("+cpu")
            self.path.mkdir()
            weight, usual = ("cpu.weight", 100) if self._v2 else ("cpu.shares", 1024)
            (self.path / weight).write_text(str(WEIGHT * usual))
            self.set(cores)
        except OSError as error:
            self.close()
            raise LabError(f"no CPU quotas here: {error}. Run as root on Linux, outside of a container.") from None

    def set(self, cores: float) -> None:
        """Change how many cores the group gets."""
        check_cores(cores)
        period = max(PERIOD_US, math.ceil(MIN_QUOTA_US / cores))
        quota = round(cores * period)
        if self._v2:
            (self.path / "cpu.max").write_text(f"{quota} {period}")
        else:
            (self.path / "cpu.cfs_quota_us").write_text(
                "-1"
            )  # Without a limit in between, the kernel accepts any new pair.
            (self.path / "cpu.cfs_period_us").write_text(str(period))
            (self.path / "cpu.cfs_quota_us").write_text(str(quota))
        self.cores = cores

    def add(self, pid: int) -> None:
        """Put a process into the group, with all its threads."""
        join(self.path, pid)

    def close(self) -> None:
        """Remove the group. Its remaining processes go to the group above, and run at full speed."""
        deadline = time.monotonic() + _GONE_WITHIN_S
        while self.path.exists() and time.monotonic() < deadline:
            for pid in members(self.path):
                with contextlib.suppress(OSError):
                    join(self.path.parent, pid)
            try:
                self.path.rmdir()
            except OSError:  # A process of the group is ending, or has just been started.
                time.sleep(0.01)


def check_cores(cores: float) -> None:
    """Refuse a number of cores that is too small or not finite.

    Raises:
        ValueError: It is.
    """
    if not (MIN_CORES <= cores < math.inf):
        raise ValueError(f"cores={cores!r} is not valid: allowed is a number from {MIN_CORES}.")


def join(group: Path, pid: int) -> None:
    """Put a process into a group, with all its threads."""
    (group / "cgroup.procs").write_text(str(pid))


def members(group: Path) -> list[int]:
    """The processes in a group; none if there is no such group."""
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def leftovers(kind: str = "") -> list[Path]:
    """Groups whose maker has ended."""
    root = _controller()
    paths = root.glob(f"{PREFIX}_*{kind and '_'}{kind}") if root is not None else ()
    return [path for path in paths if not Path(f"/proc/{_maker(path)}").exists()]


def _maker(group: Path) -> str:
    return group.name.removeprefix(f"{PREFIX}_").split("_")[0]


def _remove_leftovers() -> None:
    """Remove empty groups of labs that were killed."""
    for path in leftovers():
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def quotas(cores: list[float]) -> Iterator[list[CpuQuota]]:
    """A quota for each entry, for the length of the block."""
    made: list[CpuQuota] = []
    try:
        for share in cores:
            made.append(CpuQuota(share))
        yield made
    finally:
        for quota in made:
            quota.close()
