"""Tensors that lie in memory in another order: a fused optimizer reads parameter, gradient and state as they lie."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from labs import run
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.config import HetConfig
from raytrain_het.membership.cursor import Cursor
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.regression import Regression, flat, relative_error
from raytrain_het.worker import session as sessions
from raytrain_het.worker.state.checkpoint import read_meta

ORDER = Regression(num_samples=24, global_batch_size=12).plan
CONFIG = HetConfig(shares=(3, 1), silence_s=5)


def make():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3), torch.nn.Flatten()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 2)).double().to(memory_format=torch.channels_last)
    x = torch.randn(24, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    return model, x, x.mean((2, 3))[:, :2]


def wait_for_the_next(agent):
    """Where a slot is empty, or its worker not healed: until the hub has a generation to form."""
    if len(agent.record.members) - len(agent.record.unhealed) < len(CONFIG.shares):
        agent.wait_for(lambda: agent.want > agent.record.number, timeout=60)


@dataclass(frozen=True)
class Conv:
    """A training function."""

    epochs: int = 5

    def __call__(self, directory):
        session = sessions.current()
        model, x, y = make()
        model = het.prepare_model(model)
        optimizer = het.prepare_optimizer(torch.optim.Adam(model.parameters(), lr=0.01, fused=True))
        loader = het.prepare_data_loader(DataLoader(TensorDataset(x, y), shuffle=True), global_batch_size=12)
        for _ in loader.epochs(self.epochs):
            for x, y in loader:
                wait_for_the_next(session.worker.agent)
                optimizer.zero_grad()
                F.mse_loss(model(x.to(memory_format=torch.channels_last)), y).backward()
                optimizer.step()
            het.report({"loss": 0.0})
        return {"parameters": flat(model.parameters())}

    def plain(self):
        """The same by torch alone."""
        model, x, y = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        for epoch in range(self.epochs):
            for chosen in torch.from_numpy(ORDER.permutation(epoch).copy()).split(12):
                optimizer.zero_grad()
                batch = x[chosen].to(memory_format=torch.channels_last)
                F.mse_loss(model(batch), y[chosen]).backward()
                optimizer.step()
        return flat(model.parameters())


def test_a_channels_last_model_with_a_fused_optimizer_heals_and_resumes_as_in_one_process(tmp_path):
    task, half = Conv(), Conv(epochs=2)
    faults = [Fault(slot=1, step=2, point="backward")]
    done = run(task, tmp_path / "healed", num_slots=2, faults=faults, config=CONFIG)
    assert [e["slot"] for e in done.kinds("healed")] == [1]
    run(half, tmp_path / "first", num_slots=2, config=CONFIG)
    path = sorted((tmp_path / "first" / "storage").iterdir())[-1]
    context = {"checkpoint": str(path), "checkpoint_cursor": Cursor.from_dict(read_meta(str(path))["cursor"])}
    again = run(task, tmp_path / "again", num_slots=2, config=CONFIG, context=context)
    for parameters in (done.parameters, again.parameters):
        assert relative_error(parameters, task.plain()) < 1e-12
