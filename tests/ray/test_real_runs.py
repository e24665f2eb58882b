"""Whole runs under Ray: the real membership actor, real sessions, real steps; faults by real signals."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray_waiting import eventually
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.ray_train.hub import hub_name
from raytrain_het.worker.data.data_plan import DataPlan

LR, MOMENTUM, BATCH = 0.1, 0.9, 48


def build() -> tuple[torch.nn.Module, TensorDataset]:
    """A small net in fp64, and its data."""
    torch.manual_seed(0)
    x = torch.randn(480, 8, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(8, 1, dtype=torch.float64))
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    return net.double(), TensorDataset(x, y)


def train_fn(config: dict[str, Any]) -> str:
    """Some epochs wait for a go, so that what a test does falls between two known steps."""
    net, data = build()
    model = het.prepare_model(net)
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM))
    loader = het.prepare_data_loader(DataLoader(data, shuffle=True), global_batch_size=BATCH)
    for epoch in loader.epochs(config["epochs"]):
        while epoch in config["gates"] and not os.path.exists(config["gates"][epoch]):
            time.sleep(0.02)
        for a, b in loader:
            # The next worker of a slot is there before the end, and before a gate at which nobody could let it in.
            time.sleep(0.25 if het.num_participants() < config["count"] else 0.0)
            loss = F.mse_loss(model(a), b)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        whole = het.evaluate(lambda batch: {"mse": F.mse_loss(model(batch[0]), batch[1], reduction="sum")}, data)
        het.report(
            {"loss": loss.item(), **whole, "participants": het.num_participants()}, reduce={"participants": "max"}
        )
    return "done"


def plain(num_epochs: int) -> list[float]:
    """The errors on all samples after each epoch of one process, with torch alone."""
    net, data = build()
    x, y = data.tensors
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    plan = DataPlan(dataset_size=len(x), global_batch_size=BATCH, shuffle=True, drop_last=False, seed=0)
    errors = []
    for epoch in range(num_epochs):
        for batch in torch.from_numpy(plan.permutation(epoch).copy()).split(BATCH):
            optimizer.zero_grad()
            F.mse_loss(net(x[batch]), y[batch]).backward()
            optimizer.step()
        errors.append(F.mse_loss(net(x), y).item())
    return errors


class Run:
    """A real ``fit`` in a thread."""

    def __init__(self, path: Path, *, epochs: int, count: int = 3, gates: tuple[int, ...] = ()) -> None:
        """``gates``: the epochs that wait for :meth:`open_gate`."""
        self.path, self._gates = path, {epoch: str(path / f"gate_{epoch}") for epoch in gates}
        self.events: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []
        self.status: dict[str, Any] = {}
        self.result: Any = None
        self.error: BaseException | None = None
        self.trainer = het.HetTrainer(
            train_fn,
            train_loop_config={"epochs": epochs, "count": count, "gates": self._gates},
            het_config=het.HetConfig(shares=(4, 2, 1)[:count]),
            scaling_config=het.HetScalingConfig(workers=[het.WorkerSpec(count=count)]),
            run_config=ray.train.RunConfig(name="run", storage_path=str(path)),
            on_update=self._update,
        )
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def _update(self, status: dict[str, Any], events: list[Any], reports: list[Any]) -> None:
        self.status = status or self.status
        self.events += events
        self.reports += reports

    def _fit(self) -> None:
        try:
            self.result = self.trainer.fit()
        except BaseException as error:
            self.error = error

    def hub(self) -> Any:
        return ray.get_actor(hub_name(self.trainer.train_run_context.run_id, 0))

    def reported(self, count: int) -> None:
        eventually(lambda: len(self.reports) >= count or self.error, f"{count} reports")
        assert self.error is None, self.error

    def pids(self) -> dict[int, int]:
        return {m["slot"]: m["pid"] for m in self.status["members"] if m.get("pid") and m["alive"]}

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["kind"] == kind]

    def open_gate(self, epoch: int) -> None:
        Path(self._gates[epoch]).touch()

    def end(self) -> Any:
        for epoch in self._gates:
            self.open_gate(epoch)
        self._thread.join(90)
        assert not self._thread.is_alive(), self.status
        if self.error is not None:
            raise self.error
        return self.result

    def errors(self) -> list[float]:
        """The errors on all samples, by report. What is done again is reported again, with the same number."""
        by_step: dict[int, float] = {}
        for report in self.reports:
            error = report["metrics"]["mse"]
            assert by_step.setdefault(report["step"], error) == pytest.approx(error, rel=1e-9)
        return list(by_step.values())


@pytest.fixture(scope="module")
def undisturbed(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of four epochs in which nothing happens."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), epochs=4)
    run.end()
    return run


def test_unequal_workers_train_as_one_process_does(undisturbed: Run) -> None:
    assert undisturbed.errors() == pytest.approx(plain(4), rel=1e-9)


def test_the_summary_has_what_the_run_did(undisturbed: Run) -> None:
    summary = undisturbed.trainer.summary
    assert (summary["steps"], summary["samples"]) == (40, 1920)
    assert [w["batch_share"] for w in summary["workers"]] == [27, 14, 7]
    assert all(w["bytes_sent"] > 0 and w["device"] == "cpu" for w in summary["workers"])
    json.dumps(summary)


def test_the_same_name_goes_on_where_the_run_ended_with_other_workers(undisturbed: Run) -> None:
    run = Run(undisturbed.path, epochs=6, count=2)
    run.end()
    assert [r["step"] for r in run.reports] == [50, 60]
    assert run.errors() == pytest.approx(plain(6)[4:], rel=1e-9)


@dataclass
class Disturbed:
    """A run whose first worker is killed after two epochs, its hub and its last worker after four."""

    run: Run
    result: Any
    before: dict[int, int]
    """Process ids by slot, before anything happened."""
    healed: dict[int, int]
    """The same when the first worker's successor had been healed."""
    lost: list[int]
    """The slots that had lost a worker by then."""


@pytest.fixture(scope="module")
def disturbed(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    run = Run(tmp_path_factory.mktemp("disturbed"), epochs=6, gates=(2, 4))
    run.reported(2)
    before = run.pids()
    os.kill(before[0], signal.SIGKILL)  # slot 0 is the one that writes checkpoints
    eventually(lambda: [e["slot"] for e in run.kinds("joined")].count(0) == 2 or run.error, "slot 0 has a new worker")
    run.open_gate(2)
    eventually(lambda: [e for e in run.kinds("healed") if e["slot"] == 0] or run.error, "slot 0 healed")
    run.reported(4)
    eventually(lambda: run.pids().get(0, before[0]) != before[0], "the driver is told of worker 0's successor")
    healed, lost = run.pids(), [e["slot"] for e in run.kinds("lost")]
    ray.kill(run.hub(), no_restart=False)
    eventually(lambda: run.kinds("recovered"), "the restarted actor has heard all members")
    os.kill(eventually(lambda: run.pids().get(2), "worker 2 has told the new actor of itself"), signal.SIGKILL)
    return Disturbed(run, run.end(), before, healed, lost)


def test_a_killed_worker_is_refilled_and_changes_no_number(disturbed: Disturbed) -> None:
    run = disturbed.run
    assert run.errors() == pytest.approx(plain(6), rel=1e-9)
    assert all(r["checkpoint"] for r in run.reports)
    assert disturbed.result.metrics["mse"] == run.reports[-1]["metrics"]["mse"]
    assert disturbed.healed[0] != disturbed.before[0]
    assert {s: disturbed.healed[s] for s in (1, 2)} == {s: disturbed.before[s] for s in (1, 2)}
    assert disturbed.lost == [0]


def test_training_goes_on_while_the_membership_actor_restarts_and_it_still_heals(disturbed: Disturbed) -> None:
    assert 2 in [e["slot"] for e in disturbed.run.kinds("lost")]
    assert disturbed.result.metrics["mse"] == pytest.approx(plain(6)[-1], rel=1e-9)
