"""What belongs to the state besides parameters heals with it, moves on commit only, is averaged where it must be."""

import dataclasses

import pytest
import torch
from labs import run
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.allreduce import followed
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, differing_replicas
from raytrain_het.worker import session as sessions
from raytrain_het.worker.state.state_server import StateServer

FAULTS = [
    Fault(slot=0, step=6, point="decoded"),
    Fault(slot=1, step=17, point="updated"),
    Fault(slot=2, step=28, point="backward", kind="leave"),
    Fault(slot=0, step=40, point="backward"),
]


@pytest.mark.parametrize("faults", [[], FAULTS], ids=["calm", "faults"])
def test_running_statistics_are_the_same_everywhere_and_count_each_step_once(tmp_path, faults):
    task = Regression(batch_norm=True, patience_s=0.05, epochs=6)
    done = run(task, tmp_path, faults=faults, config=dataclasses.replace(SMALL_BUCKETS, shares=(3, 2, 1)))
    assert differing_replicas(tmp_path) == []
    buffers = [r["buffers"] for r in done.results.values()]
    assert all(torch.equal(buffers[0], other) for other in buffers)
    assert buffers[0][-1] == task.num_steps


class OneStepOfBatchNorm:
    """A single step, by workers with 9 and 3 samples."""

    x = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __call__(self, directory):
        model = het.prepare_model(torch.nn.BatchNorm1d(4).double())
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        loader = het.prepare_data_loader(DataLoader(TensorDataset(self.x)), global_batch_size=12)
        for _ in loader.epochs(1):
            for (x,) in loader:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        return model.running_mean, model.running_var, model.num_batches_tracked


def test_running_statistics_are_averages_weighted_by_samples(tmp_path):
    done = run(OneStepOfBatchNorm(), tmp_path, num_slots=2, config=dataclasses.replace(SMALL_BUCKETS, shares=(3, 1)))
    x = OneStepOfBatchNorm.x
    var = 0.75 * x[:9].var(dim=0) + 0.25 * x[9:].var(dim=0)
    for mean, variance, count in done.results.values():
        torch.testing.assert_close(mean, 0.1 * x.mean(dim=0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance, 0.9 + 0.1 * var, rtol=1e-12, atol=1e-12)
        assert count == 1


class OddBuffers(torch.nn.Module):
    """A mask, a constant that fp32 can't hold, and a running mean that is a new tensor every time."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 2, dtype=torch.float64)
        self.register_buffer("mask", torch.full((3,), torch.finfo(torch.float32).min))
        self.register_buffer("never", torch.tensor([-torch.inf, torch.nan, 1.0]))
        self.register_buffer("key", torch.tensor([2654435761, 2**40 + 1]))
        self.register_buffer("on", torch.tensor([True, False]))
        self.register_buffer("running", torch.zeros(6, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.running = 0.5 * self.running + 0.5 * x.detach().mean(dim=0)
        return self.layer(x)


class OddTask(Regression):
    def build(self):
        _, dataset = super().build()
        torch.manual_seed(0)
        return OddBuffers(), dataset

    def __call__(self, directory):
        models = []
        build = self.build
        object.__setattr__(self, "build", lambda: models.append(build()) or models[0])
        return super().__call__(directory) | {"state": {n: b.clone() for n, b in models[0][0].named_buffers()}}


def test_constants_among_buffers_stay_to_the_bit_and_rebound_ones_are_averaged(tmp_path):
    task = OddTask(num_samples=48, epochs=2, report=False)
    done = run(task, tmp_path, num_slots=2, config=dataclasses.replace(SMALL_BUCKETS, shares=(3, 1)))
    fresh = dict(OddBuffers().named_buffers())
    states = [r["state"] for r in done.results.values()]
    for name in ("mask", "never", "key", "on"):
        for state in states:
            assert torch.equal(state[name].nan_to_num(7), fresh[name].nan_to_num(7)), name
    assert torch.equal(states[0]["running"], states[1]["running"])
    _, dataset = task.build()
    expected, plan = torch.zeros(6, dtype=torch.float64), task.plan
    for epoch in range(2):
        order = plan.permutation(epoch)
        for step in range(plan.steps_per_epoch):
            batch = dataset.tensors[0][torch.from_numpy(order[12 * step : 12 * step + 12].copy())]
            expected = 0.5 * expected + 0.5 * batch.mean(dim=0)
    torch.testing.assert_close(states[0]["running"], expected, rtol=1e-12, atol=1e-12)


def test_a_share_of_zero_trains_models_with_batch_norm(tmp_path):
    task = Regression(batch_norm=True, epochs=2)
    done = run(task, tmp_path, num_slots=2, config=dataclasses.replace(SMALL_BUCKETS, shares=(1, 0)))
    done.check(task)


class PartlyUsed:
    """``nobody`` is used by no worker, ``one`` by slot 1 only. Weight decay would move what has a gradient of zero."""

    def __call__(self, directory):
        model = torch.nn.Module()
        for name in ("all", "one", "nobody"):
            model.register_parameter(name, torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
        model = het.prepare_model(model)
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5))
        data = torch.ones(12, 3, dtype=torch.float64)
        loader = het.prepare_data_loader(DataLoader(TensorDataset(data)), global_batch_size=4)
        grads = []
        for _ in loader.epochs(1):
            for (x,) in loader:
                optimizer.zero_grad()
                loss = (x @ model.all).mean()
                if sessions.current().slot == 1:
                    loss = loss + (2 * x @ model.one).mean()
                loss.backward()
                grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
                optimizer.step()
        return grads, model.nobody.detach(), model.one.detach()


def test_a_parameter_that_nobody_used_keeps_no_gradient_and_one_that_some_used_has_their_part(tmp_path):
    done = run(PartlyUsed(), tmp_path, num_slots=2, config=dataclasses.replace(SMALL_BUCKETS, shares=(3, 1)))
    ones = torch.ones(3, dtype=torch.float64)
    for grads, nobody, one in done.results.values():
        for everyone, some, none in grads:
            torch.testing.assert_close(everyone, ones)
            torch.testing.assert_close(some, 0.5 * ones)
            assert none is None
        assert torch.equal(nobody, ones)
        assert (one < ones).all()


@pytest.mark.parametrize("faults", [[], FAULTS], ids=["calm", "faults"])
def test_a_registered_scheduler_heals_and_counts_each_step_once(tmp_path, faults):
    task = Regression(scheduled=True, patience_s=0.05, epochs=6)
    done = run(task, tmp_path, faults=faults)
    done.check(task)
    for result in done.results.values():
        for step, rate in result["rates"]:
            assert rate == pytest.approx(task.lr * 0.97**step, rel=1e-9)


def test_clipping_by_the_user_survives_healing_by_the_state_of_a_peer(tmp_path):
    """The clipped gradient is not in the sums, so a replay cannot know it: the comparison must tell."""
    task = Regression(clip=0.05, patience_s=0.05, epochs=6)
    done = run(task, tmp_path, faults=FAULTS)
    done.check(task)
    assert {e["by"] for e in done.kinds("healed")} <= {"replay", "the peer's state, as the replay differed"}


class Overtaken(Regression):
    """A joiner's snapshot takes as long as six steps, and the sums of two may be kept."""

    def __call__(self, directory):
        ask = StateServer.ask

        def ask_slowly(server, host, port, name, *, give_up, **values):
            answer = ask(server, host, port, name, give_up=give_up, **values)
            session = sessions.current()
            if name.startswith("snapshot.") and session.worker.agent.uid in session.worker.agent.record.unhealed:
                comm, last = session.worker.communicator, session.worker.agent.record.base + 6
                session.worker.agent.wait_for(lambda: comm.followed.cursor.step >= last or give_up())
                assert len(comm.followed) <= 2
            return answer

        StateServer.ask, followed.KEPT_BYTES = ask_slowly, 1
        return super().__call__(directory)


def test_a_joiner_that_is_overtaken_while_it_takes_a_snapshot_keeps_a_bounded_number_of_steps_and_heals(tmp_path):
    task = Overtaken(epochs=6, patience_s=0.05)
    done = run(task, tmp_path, faults=[Fault(slot=1, step=6, point="backward")])
    done.check(task)
    assert [e["by"] for e in done.kinds("healed")] == ["the peer's state, as more steps had gone by than are kept"]


def test_clipping_of_a_step_that_a_worker_replays(tmp_path):
    """A survivor one step behind takes the sums from a peer and does its own clipping."""
    task = Regression(clip=0.05, patience_s=0.05)
    for slot in (0, 1):
        directory = tmp_path / str(slot)
        run(task, directory, faults=[Fault(slot=slot, step=13, point="decoded")]).check(task)
