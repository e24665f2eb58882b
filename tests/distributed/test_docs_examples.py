"""The training functions of the docs train: in plain processes, and through a fault."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from raytrain_het.config import HetConfig
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.processes import LabSlots, ProcessLab

DOCS = Path(__file__).resolve().parents[2] / "docs"
SETTINGS = {"start.md": {"lr": 0.01}, "training.md": {"lr": 0.1, "epochs": 3}, "faults.md": {"lr": 0.05, "epochs": 3}}


def first_example(page: str) -> dict[str, Any]:
    """What its first block defines."""
    block = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S)[0]
    names: dict[str, Any] = {"__name__": "first_example"}
    exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", SETTINGS)
def test_the_first_training_function_of_a_page_trains_in_two_workers_through_a_kill(page: str, tmp_path: Path) -> None:
    train_fn, settings = first_example(page)["train_fn"], SETTINGS[page]
    fault = Fault(slot=1, step=4, point="backward", kind="kill")
    config = HetConfig(shares=None)
    lab = ProcessLab(lambda _: train_fn(settings), tmp_path, LabSlots(num_slots=2), faults=[fault], config=config)
    lab.run(60.0)
    assert lab.failure is None
    assert [event["slot"] for event in lab.events if event["kind"] == "lost"] == [1]
    assert len(lab.reports) == settings.get("epochs", 10)
    metric = "error" if page == "faults.md" else "loss"
    values = [report["metrics"][metric] for report in lab.reports]
    assert values[-1] < values[0], "it has learnt something"
