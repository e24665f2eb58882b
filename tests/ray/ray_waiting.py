"""Waiting for what a cluster does in its own time, and looking at what it holds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group_table


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = 180.0) -> Any:
    """Poll until the condition holds; returns what it gave."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def free() -> dict[str, float]:
    """Free CPUs and GPUs of the cluster."""
    now = ray.available_resources()
    return {k: now.get(k, 0.0) for k in ("CPU", "GPU")}


def placed() -> list[dict[str, Any]]:
    """Placement groups that have not been removed."""
    return [t for t in placement_group_table().values() if t["state"] != "REMOVED"]


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
