"""A Ray to run on: a cluster that is there, or a local Ray for the length of a block."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.interrupted import restore_sigterm

_ALLOWED = "Write --address HOST:6379 of a running cluster, or --address local"
_CONNECT_S = 5.0


def is_local(address: str | None) -> bool:
    """Whether a local Ray is started, and no cluster is named."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def check_address(address: str | None) -> str:
    """The address to connect to, once something listens there. Ray itself would try for minutes.

    Raises:
        ConfigError: The address is neither HOST:PORT nor auto nor local, or nothing listens there.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address in ("local", "auto"):
        return address
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--address {address}: allowed is HOST:PORT, auto or local. {_ALLOWED}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConfigError(f"--address {address}: no Ray cluster at {host}:{port} ({error}). {_ALLOWED}") from None
    return address


def check_before_ray(address: str | None) -> None:
    """Check an address before Ray is loaded, which takes seconds. A process that is connected to Ray needs no address.

    Raises:
        ConfigError: As :func:`check_address`.
    """
    loaded = sys.modules.get("ray")
    if loaded is None or not loaded.is_initialized():
        check_address(address)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def ray_session(address: str | None, *, num_cpus: float) -> Iterator[None]:
    """Connect to Ray for the length of the block, and shut down what was started.

    Args:
        address: A cluster's address or ``auto``. The default is ``RAY_ADDRESS``, or else a local Ray. A plain
            ``ray.init()`` would not do: a cluster that was killed leaves its address behind, and it would try to
            join that.
        num_cpus: What the workers reserve together. A local Ray gets at least so many: a small machine runs a
            small job slowly, rather than not at all.

    Raises:
        ConfigError: No cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = check_address(address)
    local: dict[str, Any] = {}
    if address == "local":
        local = {
            "num_cpus": max(round(num_cpus + 0.5 - 1e-9), len(os.sched_getaffinity(0))),
            "include_dashboard": False,
        }
    # Ray's warnings of future defaults are for programmers, not for people who run a job.
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    try:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"--address {address}: no Ray cluster answers there ({_first_line(error)}). {_ALLOWED}"
            ) from None
        restore_sigterm()
        yield
    finally:
        ray.shutdown()
