"""Whole runs under Ray: the real membership actor, real sessions, real steps; faults by real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
from ray_waiting import eventually

import raytrain_het as het
from raytrain_het.ray_train.hub import hub_name

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def train_fn(config: dict[str, Any]) -> str:
    """A small net in fp64. Epochs wait for a go, so that what a test does falls between two known steps."""
    import time

    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    x = torch.randn(480, 8, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(8, 1, dtype=torch.float64))
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
    model = het.prepare_model(net)
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    loader = het.prepare_data_loader(DataLoader(TensorDataset(x, y), shuffle=True), global_batch_size=48)
    for epoch in loader.epochs(config["epochs"]):
        while epoch >= 2 and config.get("go") and not os.path.exists(config["go"]):
            time.sleep(0.02)
        for a, b in loader:
            loss = F.mse_loss(model(a), b)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        whole = het.evaluate(
            lambda batch: {"mse": F.mse_loss(model(batch[0]), batch[1], reduction="sum")}, TensorDataset(x, y)
        )
        het.report(
            {"loss": loss.item(), **whole, "participants": het.num_participants()}, reduce={"participants": "max"}
        )
    return "done"


class Run:
    """A real ``fit`` in a thread."""

    def __init__(self, path: Path, *, epochs: int = 6, name: str = "run", count: int = 3, **config: Any) -> None:
        self.go = path / f"go_{name}_{epochs}"
        self.events: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []
        self.status: dict[str, Any] = {}
        self.result: Any = None
        self.error: BaseException | None = None
        self.trainer = het.HetTrainer(
            train_fn,
            train_loop_config={"epochs": epochs, "go": str(self.go)},
            het_config=het.HetConfig(shares=(4, 2, 1)[:count], **config),
            scaling_config=het.HetScalingConfig(workers=[het.WorkerSpec(count=count)]),
            run_config=ray.train.RunConfig(name=name, storage_path=str(path)),
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

    def end(self) -> Any:
        self.go.touch()
        self._thread.join(90)
        assert not self._thread.is_alive(), self.status
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture(scope="module")
def undisturbed(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The held-out errors of a run in which nothing happens, by epoch."""
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    run.end()
    return [r["metrics"]["mse"] for r in run.reports]


def test_a_killed_worker_is_refilled_and_changes_no_number(
    cluster: Any, tmp_path: Path, undisturbed: list[float]
) -> None:
    run = Run(tmp_path)
    run.reported(2)
    before = run.pids()
    os.kill(before[0], signal.SIGKILL)  # slot 0 is the one that writes checkpoints
    run.go.touch()
    eventually(lambda: [e for e in run.kinds("healed") if e["slot"] == 0] or run.result or run.error, "slot 0 healed")
    result = run.end()
    assert [r["metrics"]["mse"] for r in run.reports] == pytest.approx(undisturbed, rel=1e-9)
    assert all(r["checkpoint"] for r in run.reports)
    assert result.metrics["mse"] == run.reports[-1]["metrics"]["mse"]
    after = {m["slot"]: m["pid"] for m in run.status["members"]}
    assert {s: after[s] for s in (1, 2)} == {s: before[s] for s in (1, 2)}
    assert [e["slot"] for e in run.kinds("lost")] == [0]


def test_training_goes_on_while_the_membership_actor_restarts_and_it_still_heals(
    cluster: Any, tmp_path: Path, undisturbed: list[float]
) -> None:
    run = Run(tmp_path)
    run.reported(2)
    ray.kill(run.hub(), no_restart=False)
    eventually(lambda: run.kinds("recovered"), "the restarted actor has heard all members")
    os.kill(eventually(lambda: run.pids().get(2), "worker 2 has told the new actor of itself"), signal.SIGKILL)
    result = run.end()
    assert run.kinds("lost")
    assert result.metrics["mse"] == pytest.approx(undisturbed[-1], rel=1e-9)


def test_the_same_name_goes_on_where_the_run_ended_with_other_workers(
    cluster: Any, tmp_path: Path, undisturbed: list[float]
) -> None:
    Run(tmp_path, epochs=2, name="again").end()
    run = Run(tmp_path, epochs=4, name="again", count=2)
    run.end()
    assert [r["step"] for r in run.reports] == [30, 40]
    assert [r["metrics"]["mse"] for r in run.reports] == pytest.approx(undisturbed[2:4], rel=1e-9)


def test_the_summary_has_what_the_run_did(cluster: Any, tmp_path: Path) -> None:
    run = Run(tmp_path, epochs=2)
    run.end()
    summary = run.trainer.summary
    assert (summary["steps"], summary["samples"]) == (20, 960)
    assert [w["batch_share"] for w in summary["workers"]] == [27, 14, 7]
    assert all(w["bytes_sent"] > 0 and w["device"] == "cpu" for w in summary["workers"])
    json.dumps(summary)


def test_the_default_job_learns_the_digits_on_unequal_workers(cluster: Any, tmp_path: Path) -> None:
    code = "import sys; from raytrain_het.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--json", "--storage", str(tmp_path), "--name", "digits"],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert summary["metrics"]["accuracy"] >= 0.97
    assert [w["world_rank"] for w in summary["workers"]] == [0, 1]
    # On a machine that stood still one may have been taken for lost: then the other has all of the batch.
    events = [json.loads(line) for line in (tmp_path / "digits" / "events.jsonl").read_text().splitlines()]
    formed = [event["slots"] for event in events if event["kind"] == "formed"]
    assert formed[0] == [0, 1]
    last = [next(slots for slots in reversed(formed) if slot in slots) for slot in (0, 1)]
    shares = [w["batch_share"] for w in summary["workers"]]
    assert shares == [share if len(slots) == 2 else 64 for share, slots in zip((48, 16), last, strict=True)]
    times = [json.loads(line)["time"] for line in (tmp_path / "digits" / "metrics.jsonl").read_text().splitlines()]
    assert times[-1] - times[0] < 120
    kept = {path.name for path in (tmp_path / "digits").iterdir()}
    assert {"job.yaml", "config.json", "metrics.jsonl", "events.jsonl"} <= kept
    (board,) = (tmp_path / "digits").glob("events.out.tfevents*")
    assert b"worker_0/bytes_sent_per_step" in board.read_bytes()


@pytest.mark.parametrize("script", ["quickstart_ray.py", "quickstart_het.py"])
def test_both_quickstarts_run(cluster: Any, script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / script)],
        env={**os.environ, "RAY_ADDRESS": cluster.address, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "epoch 4" in done.stdout + done.stderr
