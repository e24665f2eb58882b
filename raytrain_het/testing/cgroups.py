"""Slow machines on one machine: processes under a CPU quota of the kernel (Linux, as root)."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 10_000
"""Short, so that a slow process runs evenly: a tenth of a core is 1 ms in every 10."""
PREFIX = "raytrain_het_lab"


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

    Raises:
        LabError: no CPU controller that this process may use.
    """

    def __init__(self, cores: float) -> None:
        root = _controller()
        if root is None or not available():
            raise LabError(
                f"no CPU quotas here: {ROOT} has no cpu controller that this user may write to. Run as root on Linux, "
                "outside of a container or in a privileged one."
            )
        self._v2 = root == ROOT
        if self._v2:
            with contextlib.suppress(OSError):
                (root / "cgroup.subtree_control").write_text("+cpu")
        _remove_leftovers(root)
        self.path = root / f"{PREFIX}_{os.getpid()}_{secrets.token_hex(3)}"
        self.path.mkdir()
        self.cores = 0.0
        self.set(cores)

    def set(self, cores: float) -> None:
        """From now on so many cores."""
        if cores <= 0:
            raise ValueError(f"cores={cores!r} is not valid: allowed is a number above 0.")
        quota = max(round(cores * PERIOD_US), 1000)  # The kernel takes no less than 1 ms.
        if self._v2:
            (self.path / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        else:
            (self.path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self.path / "cpu.cfs_quota_us").write_text(str(quota))
        self.cores = cores

    def add(self, pid: int) -> None:
        """Put a process into it, with all its threads."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Remove it. Processes that are left go back to where they came from, at full speed."""
        for pid in self._pids():
            with contextlib.suppress(OSError):
                (self.path.parent / "cgroup.procs").write_text(str(pid))
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _pids(self) -> list[int]:
        try:
            return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]
        except OSError:
            return []


def _remove_leftovers(root: Path) -> None:
    """Groups of labs that were killed: those whose maker is gone, and that are empty."""
    for path in root.glob(f"{PREFIX}_*"):
        maker = path.name.removeprefix(f"{PREFIX}_").split("_")[0]
        if not Path(f"/proc/{maker}").exists():
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
