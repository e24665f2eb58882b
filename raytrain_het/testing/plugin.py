"""Pytest fixtures: ``pytest_plugins = ["raytrain_het.testing.plugin"]``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pytest

from raytrain_het.testing.cgroups import CpuQuota, LabError
from raytrain_het.testing.cluster import Node, RayLab, check
from raytrain_het.testing.throttle import StopAndGo, throttle


@pytest.fixture
def slow_cores() -> Iterator[Callable[..., CpuQuota | StopAndGo]]:
    """``slow_cores(0.25, pid, ...)``: from now on these processes get a quarter of a core together.

    Returns the object that slows them: it can change the speed, and add other processes. At the end of the test they
    run at full speed again. The test is skipped if processes cannot be slowed here.
    """
    with contextlib.ExitStack() as stack:

        def slow(cores: float, *pids: int) -> CpuQuota | StopAndGo:
            try:
                made = stack.enter_context(contextlib.closing(throttle(cores)))
            except LabError as error:
                pytest.skip(str(error))
            for pid in pids:
                made.add(pid)
            return made

        yield slow


@pytest.fixture
def ray_lab() -> Iterator[Callable[[Sequence[Node]], RayLab]]:
    """``ray_lab([Node(cores=0.8), Node(cores=0.4)])``: a cluster of such nodes, to which this process is connected.

    It ends with the test. If no lab can be built here, the test is skipped, and the reason says what is missing.
    """
    import ray

    with contextlib.ExitStack() as stack:

        def build(nodes: Sequence[Node]) -> RayLab:
            try:
                check()
            except LabError as error:
                pytest.skip(str(error))
            # An error from here on is a failure of the test, and no reason to skip it.
            lab = stack.enter_context(RayLab(nodes))
            ray.init(address=lab.address, log_to_driver=False)
            return lab

        yield build
