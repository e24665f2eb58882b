"""Loss scalers: each worker's scale is its own affair, the mean is of unscaled gradients, an overflow skips for all."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from labs import alone, plain, run
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.errors import ConfigError, LoopOrderError
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, flat, relative_error
from raytrain_het.worker import session as sessions
from raytrain_het.worker.state.registered import RegisteredState
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.step.optimizer import _check_scaler


@dataclass(frozen=True, kw_only=True)
class Scaled(Regression):
    """Every worker starts with a scale of its own, a power of two; one (a CPU beside GPUs) does not scale its loss."""

    off: int = 2
    """The slot that does not."""
    overflow_step: int = -1
    """Worker 0's scaled loss is infinite in this step (0 is the first)."""

    def __call__(self, directory: str) -> dict[str, Any]:
        session = sessions.current()
        model, dataset = self.build()
        model = het.prepare_model(model)
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum))
        scale = 2.0 ** (4 + 6 * session.slot)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=session.slot != self.off)
        het.register_state("scaler", scaler)
        loader = het.prepare_data_loader(
            DataLoader(dataset, shuffle=True),
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
        )
        scales = []
        for _ in loader.epochs(self.epochs):
            for x, y in loader:
                time.sleep(self.patience_s if het.num_participants() < session.num_slots else 0.0)
                loss = F.mse_loss(model(x), y)
                optimizer.zero_grad()
                step = session.worker.engine.cursor.step
                scaled = scaler.scale(loss)
                (scaled * torch.inf if session.slot == 0 and step == self.overflow_step else scaled).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip or torch.inf)
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
        return {"parameters": flat(model.parameters()), "scales": scales}


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize(
    ("off", "scales"),
    # All begin with the state of worker 0: where that has a scale, those that scale take it over.
    [(0, [1.0, 2.0**10, 2.0**16]), (2, [2.0**4, 2.0**4, 1.0])],
)
def test_workers_with_different_scales_make_one_exact_mean(tmp_path, off, scales, micro_batch_size):
    task = Scaled(clip=0.05, off=off, micro_batch_size=micro_batch_size)
    done = run(task, tmp_path)
    assert relative_error(done.parameters, plain(Regression(clip=0.05))) < 1e-12
    assert [done.results[slot]["scales"][-1] for slot in range(3)] == scales


def test_an_overflow_of_one_worker_skips_the_update_of_all_and_every_scaler_backs_off(tmp_path):
    task = Scaled(off=0, overflow_step=7)
    done = run(task, tmp_path)
    assert relative_error(done.parameters, plain(Regression(nan_steps=(7,)))) < 1e-12
    for slot, before in ((1, 2.0**10), (2, 2.0**16)):
        scales = done.results[slot]["scales"]
        assert scales[6] == before
        assert scales[-1] == before / 2


@pytest.mark.parametrize("compression", ["int8", "sign", {"topk": {"density": 0.25}}, "lowrank"], ids=str)
def test_every_scaler_sees_an_overflow_that_the_codec_did_not_send(tmp_path, compression):
    config = dataclasses.replace(SMALL_BUCKETS, compression=compression)
    done = run(Scaled(off=0, overflow_step=3, epochs=1), tmp_path, config=config)
    for slot, before in ((1, 2.0**10), (2, 2.0**16)):
        scales = done.results[slot]["scales"]
        assert (scales[2], scales[-1]) == (before, before / 2)


def test_a_worker_that_heals_from_one_that_does_not_scale_keeps_a_scale_of_its_own(tmp_path):
    task = Scaled(off=0, patience_s=0.05)
    faults = [Fault(slot=1, step=5, point="backward"), Fault(slot=2, step=12, point="updated")]
    done = run(task, tmp_path, faults=faults)
    assert relative_error(done.parameters, plain(Regression())) < 1e-9
    assert [done.results[slot]["scales"][-1] for slot in range(3)] == [1.0, 2.0**10, 2.0**16]


def train_one_epoch(model, optimizer, loader, scaler):
    for _ in loader.epochs(1):
        for (x,) in loader:
            optimizer.zero_grad()
            scaler.scale(model(x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()


def train_unregistered(*, enabled, scheduled=False):
    """With a scaler that the run is not told of; returns the number of committed steps."""
    model = het.prepare_model(torch.nn.Linear(3, 1))
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    loader = het.prepare_data_loader(DataLoader(TensorDataset(torch.ones(8, 3))), global_batch_size=4)
    if scheduled:
        het.register_state("scheduler", torch.optim.lr_scheduler.StepLR(optimizer, 1))
    train_one_epoch(model, optimizer, loader, torch.amp.GradScaler("cpu", enabled=enabled))
    return sessions.current().worker.engine.cursor.step


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_scaler_that_is_not_registered_is_an_error(tmp_path, scheduled):
    with pytest.raises(LoopOrderError, match=r"het.register_state\('scaler', scaler\)"):
        alone(lambda: train_unregistered(enabled=True, scheduled=scheduled), tmp_path)


def test_one_that_is_switched_off_needs_no_registration(tmp_path):
    assert alone(lambda: train_unregistered(enabled=False), tmp_path) == 2


def test_parameters_in_half_precision_are_refused_with_a_scaler():
    """Torch refuses them itself, but for fused optimizers, whose step() it calls whatever overflowed."""
    scaler, model = torch.amp.GradScaler("cpu"), torch.nn.Linear(2, 1).half()
    registered = RegisteredState()
    registered.add("scaler", scaler)
    with pytest.raises(LoopOrderError, match=r"float16 \('weight'.*use torch.autocast"):
        _check_scaler(scaler, Replica(model, torch.optim.SGD(model.parameters()), registered))
    model.float()
    assert _check_scaler(scaler, Replica(model, torch.optim.SGD(model.parameters()), registered)) is None


def test_a_scale_that_is_no_power_of_two_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"GradScaler\(init_scale=1000\).*powers of 2.*Write init_scale=1024"):
        alone(lambda: het.register_state("scaler", torch.amp.GradScaler("cpu", init_scale=1000.0)), tmp_path)


def test_a_second_scaler_is_refused(tmp_path):
    def train():
        het.register_state("first", torch.amp.GradScaler("cpu"))
        het.register_state("second", torch.amp.GradScaler("cpu"))

    with pytest.raises(ConfigError, match="a second GradScaler"):
        alone(train, tmp_path)


def train_clipped(*, fused, enabled):
    """Without ``unscale_``: a fused optimizer takes the scale off by itself, after gradients were clipped."""
    torch.manual_seed(0)
    model = het.prepare_model(torch.nn.Linear(3, 1))
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1, fused=fused))
    loader = het.prepare_data_loader(DataLoader(TensorDataset(torch.ones(8, 3))), global_batch_size=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    het.register_state("scaler", scaler)
    train_one_epoch(model, optimizer, loader, scaler)
    return flat(model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_clipped_as_if_there_were_no_scale(tmp_path, fused):
    config = het.HetConfig(clip={"norm": 0.01})
    expected = alone(lambda: train_clipped(fused=False, enabled=False), tmp_path / "plain", config=config)
    got = alone(lambda: train_clipped(fused=fused, enabled=True), tmp_path / "scaled", config=config)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
