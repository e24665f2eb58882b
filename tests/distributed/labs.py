"""What the distributed tests share. Workers import this too, so it stays free of pytest."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runs import run_of

from raytrain_het.allreduce.reducers import sharding
from raytrain_het.config import HetConfig
from raytrain_het.membership.server import Hub
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.lab_worker import WorkerFiles
from raytrain_het.testing.ledger import LedgerReport, check_exactly_once, read_ledgers
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, differing_replicas, relative_error
from raytrain_het.worker import session as sessions
from raytrain_het.worker.state.checkpoint import LocalStorage

TIMEOUT_S = 60.0


@dataclass
class Run:
    """A run that has ended."""

    lab: ProcessLab
    results: dict[int, Any]

    @property
    def directory(self) -> Path:
        return Path(self.lab.directory)

    def kinds(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of some kinds, in order."""
        return [e for e in self.lab.events if e["kind"] in kinds]

    @property
    def parameters(self) -> torch.Tensor:
        """Those of all workers that came to the end: the same to the bit."""
        first, *others = [r["parameters"] for r in self.results.values() if r is not None]
        assert all(torch.equal(first, other) for other in others)
        return first

    def check(self, task: Regression, *, error: float = 1e-9, reports: bool = True) -> LedgerReport:
        """What must hold of every run of a task, whatever happened to it."""
        report = check_exactly_once(read_ledgers(self.directory), task.plan, epochs=task.epochs)
        assert differing_replicas(self.directory) == []
        assert relative_error(self.parameters, plain(task)) < error
        if task.report and reports:
            self.check_reports(task)
        return report

    def check_reports(self, task: Regression) -> None:
        """Every epoch's report is whole and registered, once, and its checkpoint is there."""
        steps = [task.plan.steps_per_epoch * (epoch + 1) for epoch in range(task.epochs)]
        # Where all began again from a checkpoint, the last report of a step counts.
        reports = {r["step"]: r for r in self.lab.reports}
        assert sorted(reports) == steps
        for report in reports.values():
            assert report["checkpoint"], report
            assert (Path(report["checkpoint"]) / "het.json").exists()


@functools.cache
def plain(task: Regression) -> torch.Tensor:
    """The task's result with torch alone."""
    return task.plain()


@dataclass(frozen=True)
class CutUp:
    """A training function whose buckets are cut among all owners, as large ones are, however small they are."""

    task: Callable[[str], Any]

    def __call__(self, directory: str) -> Any:
        sharding.MIN_SHARD_BYTES = sharding.MIN_SHARD_BYTES_ON_ONE_MACHINE = 1
        return self.task(directory)


def run(
    task: Callable[[str], Any],
    directory: Path,
    *,
    num_slots: int = 3,
    faults: list[Fault] | None = None,
    config: HetConfig = SMALL_BUCKETS,
    timeout_s: float = TIMEOUT_S,
    on_poll: Callable[[ProcessLab], None] | None = None,
    cut_up: bool = True,
    **lab_kwargs: Any,
) -> Run:
    """Run a training function in plain processes, to its end.

    ``lab_kwargs`` are arguments of :class:`ProcessLab`, fields of its slots, or the storage of its workers.
    """
    slots = LabSlots(num_slots=num_slots, **{k: lab_kwargs.pop(k) for k in ("refill", "machines") if k in lab_kwargs})
    files = WorkerFiles(storage=lab_kwargs.pop("storage", None))
    task = CutUp(task) if cut_up else task
    lab = ProcessLab(task, directory, slots, faults=faults or (), config=config, files=files, **lab_kwargs)
    results = lab.run(timeout_s, on_poll=functools.partial(on_poll, lab) if on_poll else None)
    return Run(lab, results)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for something that other processes do."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


def alone(
    train_fn: Callable[[], Any],
    directory: Path,
    *,
    num_slots: int = 1,
    config: HetConfig | None = None,
    acknowledge: bool = False,
    **context: Any,
) -> Any:
    """Run a training function as the only worker, in this very process."""
    hub = Hub(*run_of(num_slots, **context))
    over = threading.Event()

    def keep_acknowledging() -> None:
        while not over.wait(0.01):
            hub.acknowledge([report["key"] for report in hub.take_reports()])

    if acknowledge:
        threading.Thread(target=keep_acknowledging, daemon=True).start()
    try:
        return sessions.run_worker(
            train_fn,
            config=config or HetConfig(),
            slot=0,
            num_slots=num_slots,
            locate=hub.address,
            storage=LocalStorage(directory / "storage"),
            device=torch.device("cpu"),
            node_ip="127.0.0.1",
        )
    finally:
        over.set()
        hub.shutdown()
