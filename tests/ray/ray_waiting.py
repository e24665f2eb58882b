"""Waiting for what a cluster does in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray


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
