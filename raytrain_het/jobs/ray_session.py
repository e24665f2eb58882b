"""A Ray to run on: the one that is there, or a quiet local one that goes away again."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raytrain_het.errors import ConfigError


@contextmanager
def ray_session(address: str | None, *, num_cpus: float) -> Iterator[None]:
    """Connect to Ray for the length of the block, and shut down what was started.

    Args:
        address: A cluster's address or ``auto``. Without one, ``RAY_ADDRESS`` counts, and without
            that a local Ray is started, even if files of a dead one lie about: a cluster that was
            killed hard leaves its address behind, and a plain ``ray.init()`` would try to join it.
        num_cpus: What the workers reserve together. A local Ray is given so many at least, since a
            small machine should run a small job slowly rather than not at all.

    Raises:
        ConfigError: No cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local: dict[str, Any] = {}
    if address == "local":
        local = {
            "num_cpus": max(round(num_cpus + 0.5 - 1e-9), len(os.sched_getaffinity(0))),
            "include_dashboard": False,
        }
    # Ray's announcements of future defaults are for its callers, not for those who run a job.
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    try:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except ConnectionError as error:
            raise ConfigError(
                f"address={address!r}: no Ray cluster answers there ({error}). "
                "Write --address HOST:6379 of a running cluster, or --address local"
            ) from None
        yield
    finally:
        ray.shutdown()
