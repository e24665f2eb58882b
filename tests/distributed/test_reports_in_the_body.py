"""Reports in the loop's body: of which step a checkpoint is, and what a step that fails makes of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from labs import run
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.membership.cursor import Cursor
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.regression import flat

SAMPLES, BATCH, EPOCHS = 48, 12, 4


class Count:
    """Registered: how often the body has run, which the learning rate follows."""

    value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


@dataclass(frozen=True)
class Reporting:
    """Reports in the body, at one place of it, whenever the count is one of ``at``."""

    place: str
    at: tuple[int, ...]

    def __call__(self, directory: str) -> dict[str, Any]:
        torch.manual_seed(0)
        x = torch.randn(SAMPLES, 6, dtype=torch.float64)
        layers = [torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 1)]
        model = het.prepare_model(torch.nn.Sequential(*layers).double())
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        count = Count()
        het.register_state("count", count)
        dataset = TensorDataset(x, x.sum(dim=1, keepdim=True))
        loader = het.prepare_data_loader(DataLoader(dataset, shuffle=True), global_batch_size=BATCH)
        for _ in loader.epochs(EPOCHS):
            for inputs, targets in loader:
                count.value += 1
                optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, count.value / 12)
                self.report_at("start", count)
                loss = F.mse_loss(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                self.report_at("after_backward", count)
                optimizer.step()
                self.report_at("after_step", count)
        return {"parameters": flat(model.parameters()), "buffers": flat(model.buffers()), "count": count.value}

    def report_at(self, place: str, count: Count) -> None:
        if place == self.place and count.value in self.at:
            het.report({"count": float(count.value)})


@pytest.mark.parametrize(("place", "step"), [("start", 6), ("after_backward", 6), ("after_step", 7)])
def test_a_run_that_resumes_from_a_checkpoint_of_the_body_trains_as_if_it_had_not_stopped(
    tmp_path: Path, place: str, step: int
) -> None:
    """Before the update it is of the step's beginning: the count, the rate that follows it, batch norm's statistics."""
    whole = run(Reporting(place, (7,)), tmp_path / "whole", num_slots=2)
    (report,) = whole.lab.reports
    assert report["step"] == step
    cursor = Cursor(**json.loads((Path(report["checkpoint"]) / "het.json").read_text())["cursor"])
    context = {"checkpoint": report["checkpoint"], "checkpoint_cursor": cursor}
    rest = run(Reporting(place, ()), tmp_path / "rest", num_slots=2, context=context)
    expected, got = whole.results[0], rest.results[0]
    assert got["count"] == expected["count"] == EPOCHS * SAMPLES // BATCH
    for name in ("parameters", "buffers"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("place", ["start", "after_backward", "after_step"])
def test_a_body_that_runs_again_reports_once(tmp_path: Path, place: str) -> None:
    """The others go on with the body of the step in which one is killed, though the step comes to nothing."""
    faults = [Fault(slot=1, step=7, point="backward")]
    done = run(Reporting(place, (6, 7, 8)), tmp_path, faults=faults, refill=False)
    assert [e["slot"] for e in done.kinds("lost")] == [1]
    assert Counter(report["metrics"]["count"] for report in done.lab.reports) == {6.0: 1, 7.0: 1, 8.0: 1}
    assert all(report["key"].endswith(".0") for report in done.lab.reports)
