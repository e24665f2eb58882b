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

    Returns what slows them, to change that or to add others. With the test they are let go. Skips where processes
    cannot be slowed.
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
    """``ray_lab([Node(cores=0.8), Node(cores=0.4)])``: a cluster of such nodes, and this process connected to it.

    With the test it ends. Skips, with what is missing, where no lab can be built.
    """
    import ray

    with contextlib.ExitStack() as stack:

        def build(nodes: Sequence[Node]) -> RayLab:
            try:
                check()
            except LabError as error:
                pytest.skip(str(error))
            lab = stack.enter_context(RayLab(nodes))  # What fails from here on is no lack of anything.
            ray.init(address=lab.address, log_to_driver=False)
            return lab

        yield build
