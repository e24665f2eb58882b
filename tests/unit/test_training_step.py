"""Each job's training step by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytrain_het.jobs.table import JOBS, load_job

FILES = Path(__file__).parents[2] / "experiments" / "jobs"
SMALL = {"tabular": ["rows=500"], "char_lm": ["max_characters=10000", "layers=1", "width=8", "heads=1"]}


@pytest.mark.parametrize("kind", JOBS)
def test_a_step_of_any_size_trains_the_model(kind: str) -> None:
    job = load_job(FILES / f"{kind}.yaml", SMALL.get(kind, []))
    step = job.make_step(job.train_loop_config(), torch.device("cpu"))
    for samples in (1, 7, 600):  # The last one goes round some of the data sets.
        before = [p.detach().clone() for p in step.model.parameters()]
        step(samples)
        assert any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    step.micro_batch_size = 3
    passes = []
    step.model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    step(7)
    assert passes == [3, 2, 2]
    num_parameters = sum(p.numel() for p in step.model.parameters())
    assert step.gradient_bytes("none") == 4 * num_parameters
    assert step.gradient_bytes("bf16") == 2 * num_parameters
