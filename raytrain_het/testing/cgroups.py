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
"""The kernel takes no less: slower groups get a longer period."""
WEIGHT = 100
"""A group counts as so many processes where there are more than cores: its quota is to slow it, nothing else."""
MIN_CORES = 0.01
"""Slower than that nothing answers in time."""
PREFIX = "raytrain_het_lab"
_GONE_WITHIN_S = 5.0


class LabError(RuntimeError):
    """The lab can't be built here; the message says what is missing."""


def available() -> bool:
    """Whether quotas can be set here."""
    return _controller() is not None and os.access(_controller() or ROOT, os.W_OK)


def _controller() -> Path | None:
    """The CPU controller: of its own under cgroup v1, in the common tree under v2."""
    if (ROOT / "cpu" / "cpu.cfs_quota_us").exists():
        return ROOT / "cpu"
    try:
        return ROOT if "cpu" in (ROOT / "cgroup.controllers").read_text().split() else None
    except OSError:
        return None


class CpuQuota:
    """A group of processes that together get ``cores`` of a core. Processes that they start belong to it too.

    Args:
        cores: above 0; may be changed while they run, with :meth:`set`.
        kind: stands at the end of the group's name.

    Raises:
        LabError: no CPU controller that this process may use.
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
        """From now on so many cores."""
        check_cores(cores)
        period = max(PERIOD_US, math.ceil(MIN_QUOTA_US / cores))
        quota = round(cores * period)
        if self._v2:
            (self.path / "cpu.max").write_text(f"{quota} {period}")
        else:
            (self.path / "cpu.cfs_quota_us").write_text("-1")  # Whatever the order, none is refused on the way.
            (self.path / "cpu.cfs_period_us").write_text(str(period))
            (self.path / "cpu.cfs_quota_us").write_text(str(quota))
        self.cores = cores

    def add(self, pid: int) -> None:
        """Put a process into it, with all its threads."""
        join(self.path, pid)

    def close(self) -> None:
        """Remove it. Processes that are left go back to where they came from, at full speed."""
        deadline = time.monotonic() + _GONE_WITHIN_S
        while self.path.exists() and time.monotonic() < deadline:
            for pid in members(self.path):
                with contextlib.suppress(OSError):
                    join(self.path.parent, pid)
            try:
                self.path.rmdir()
            except OSError:  # A process of it is just ending, or has just been started.
                time.sleep(0.01)


def check_cores(cores: float) -> None:
    """Refuse what is no speed."""
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
    """Groups whose maker is gone."""
    root = _controller()
    paths = root.glob(f"{PREFIX}_*{kind and '_'}{kind}") if root is not None else ()
    return [path for path in paths if not Path(f"/proc/{_maker(path)}").exists()]


def _maker(group: Path) -> str:
    return group.name.removeprefix(f"{PREFIX}_").split("_")[0]


def _remove_leftovers() -> None:
    """Groups of labs that were killed, if they are empty."""
    for path in leftovers():
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def quotas(cores: list[float]) -> Iterator[list[CpuQuota]]:
    """A quota each, removed at the end."""
    made: list[CpuQuota] = []
    try:
        for share in cores:
            made.append(CpuQuota(share))
        yield made
    finally:
        for quota in made:
            quota.close()
