"""Gradients that are not finite: all skip alike, and people are told who and what."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from labs import alone, run
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.config import HetConfig
from raytrain_het.errors import NonFiniteGradientError
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.processes import WorkersFailedError
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression


def test_a_nan_on_one_worker_is_skipped_by_all_alike(tmp_path):
    task = Regression(nan_steps=(5, 6, 20))
    done = run(task, tmp_path)
    done.check(task, error=1e-12)
    skipped = done.kinds("skipped")
    assert [(e["slot"], e["step"]) for e in skipped] == [(1, 6), (1, 7), (1, 21)]
    assert set(skipped[0]["parameters"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_skipped_step_is_replayed_as_skipped(tmp_path):
    task = Regression(nan_steps=(12, 13, 16, 17, 18, 19, 20), patience_s=0.05)
    faults = [Fault(slot=0, step=13, point="updated"), Fault(slot=2, step=18, point="decoded")]
    run(task, tmp_path, faults=faults).check(task)


def test_running_statistics_survive_a_skipped_step(tmp_path):
    task = Regression(nan_steps=(5,), batch_norm=True)
    done = run(task, tmp_path)
    assert torch.isfinite(done.results[0]["buffers"]).all()


def test_too_many_skipped_steps_in_a_row_fail_the_run(tmp_path):
    task = Regression(nan_steps=tuple(range(8, 40)))
    with pytest.raises(WorkersFailedError, match=r"NonFiniteGradientError: 3 updates in a row were skipped") as failed:
        run(task, tmp_path, config=dataclasses.replace(SMALL_BUCKETS, max_skipped_steps=3))
    assert "HetConfig(max_skipped_steps=3)" in str(failed.value)


def test_a_nan_in_the_data_names_the_sample(tmp_path, caplog):
    x = torch.randn(12, 3)
    x[7, 1] = torch.nan

    def train():
        model = het.prepare_model(torch.nn.Linear(3, 1))
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        loader = het.prepare_data_loader(DataLoader(TensorDataset(x, x), shuffle=True), global_batch_size=4)
        for _ in loader.epochs(1):
            for a, b in loader:
                optimizer.zero_grad()
                F.mse_loss(model(a), b[:, :1]).backward()
                optimizer.step()

    with pytest.raises(
        NonFiniteGradientError, match=r"worker 0, parameters .*'bias'.*the data is not finite: samples \[7\]"
    ):
        alone(train, tmp_path, config=HetConfig(max_skipped_steps=1))
