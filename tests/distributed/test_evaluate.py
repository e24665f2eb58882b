"""Evaluation: exact means over the whole dataset, the same to the bit on all, whoever dies meanwhile."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from labs import run, wait_until
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.testing.campaign import Waker
from raytrain_het.testing.regression import Regression, flat
from raytrain_het.worker import session as sessions

TASK = Regression()


class Evaluating:
    """Evaluates after every epoch; the worker in slot ``killed`` dies at its second batch of the second evaluation."""

    def __init__(self, killed=None, how=signal.SIGKILL):
        self.killed, self.how = killed, how
        generator = torch.Generator().manual_seed(1)
        self.held_out = TensorDataset(
            torch.randn(103, 6, dtype=torch.float64, generator=generator),
            torch.randn(103, 2, dtype=torch.float64, generator=generator),
        )

    def __call__(self, directory):
        session = sessions.current()
        model, dataset = TASK.build()
        model = het.prepare_model(model)
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.05))
        loader = het.prepare_data_loader(DataLoader(dataset, shuffle=True), global_batch_size=12)
        num_batches = 0
        mark = Path(directory) / "killed"

        def measure(batch):
            nonlocal num_batches
            num_batches += 1
            assert not model.training
            if epoch == 1 and session.slot == self.killed and num_batches > 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), self.how)
            if epoch == 1 and self.killed not in (None, session.slot):
                wait_until(mark.exists)  # Else the others might do all the batches before its second one.
            x, y = batch
            return {"mse": F.mse_loss(model(x), y, reduction="sum") / 2, "count": float(len(x))}

        means = {}
        for epoch in loader.epochs(3):
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
            num_batches = 0
            means[epoch] = het.evaluate(measure, self.held_out, batch_size=8)
            assert model.training
        return {"parameters": flat(model.parameters()), "means": means, "model": model.state_dict()}


@pytest.mark.parametrize(
    ("killed", "how"), [(None, None), (0, signal.SIGKILL), (2, signal.SIGKILL), (1, signal.SIGSTOP)], ids=str
)
def test_means_are_exact_and_identical_even_if_a_worker_dies_or_stops_meanwhile(tmp_path, killed, how):
    task = Evaluating(killed, how)
    wakers = {}
    done = run(task, tmp_path, on_poll=lambda lab: wakers.setdefault(0, Waker(lab))())
    assert (tmp_path / "killed").exists() == (killed is not None)
    results = list(done.results.values())
    assert len(results) >= 2  # The refilled one may come when the run is over.
    for epoch in (0, 1, 2):
        seen = {r["means"][epoch]["mse"].hex() for r in results if epoch in r["means"]}
        assert len(seen) == 1
        assert all(r["means"][epoch]["count"] == 1.0 for r in results if epoch in r["means"])
    model, _ = TASK.build()
    model.load_state_dict(results[0]["model"])
    x, y = task.held_out.tensors
    assert results[0]["means"][2]["mse"] == pytest.approx(F.mse_loss(model(x), y).item(), rel=1e-12)
