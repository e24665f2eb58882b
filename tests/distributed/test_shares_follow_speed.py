"""Workers of unequal speed: shares and scales follow what they take for their steps, and the result stays exact."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest
import torch
import torch.nn.functional as F
from labs import alone, run
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.testing.cgroups import CpuQuota, available
from raytrain_het.testing.faults import Fault, happened
from raytrain_het.testing.ledger import read_ledgers
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, flat, relative_error
from raytrain_het.worker.session import current

TASK = Regression(num_samples=960, global_batch_size=96, epochs=3, report=False)
AUTO = dataclasses.replace(SMALL_BUCKETS, shares="auto")


class Uneven:
    """The task, with workers that say they take so many milliseconds for a sample, by slot; from a step on, other ones.

    They say so, and do not sleep as long: what a busy machine adds is no part of the claims here. Steps last long
    enough for the hub to hear of them.
    """

    def __init__(self, task, *ms, then=None, at_step=10**9):
        self.task, self.ms, self.then, self.at_step = task, ms, then or ms, at_step

    def __call__(self, directory):
        session = current()
        scripted = None

        def work(point, step):
            nonlocal scripted
            if point != "backward":
                return
            if scripted is not session.worker.engine.timings:
                scripted = session.worker.engine.timings
                tell = scripted.step_done
                scripted.step_done = lambda samples, _, cycle_s, **more: tell(
                    samples, cycle_s - self.own_s(samples), cycle_s, **more
                )
            self.step = step
            time.sleep(0.02)

        current().points.listeners.append(work)
        return self.task(directory)

    def own_s(self, samples):
        return samples * (self.ms if self.step <= self.at_step else self.then)[current().slot] / 1000


def shares_by_step(directory):
    """Step -> slot -> samples, in the generation that counts."""
    steps = {}
    for entry in sorted(read_ledgers(directory), key=lambda e: (e.step, e.generation)):
        steps[entry.step] = {int(uid.split("-")[0]): stop - start for uid, (start, stop) in entry.slices.items()}
    return steps


def test_shares_come_to_be_in_proportion_to_speeds_and_the_result_is_the_same(tmp_path):
    done = run(Uneven(TASK, 0.25, 0.5, 1.0), tmp_path, config=AUTO)
    done.check(TASK)
    shares = shares_by_step(tmp_path)
    assert shares[0] == {0: 32, 1: 32, 2: 32}
    last = shares[TASK.num_steps - 1]
    assert [abs(last[slot] - b) <= 2 for slot, b in enumerate((55, 27, 14))] == [True] * 3
    assert done.kinds("table")


def test_a_worker_that_slows_down_in_mid_run_gets_less(tmp_path):
    task = dataclasses.replace(TASK, epochs=6)
    done = run(Uneven(task, 0.3, 0.3, then=(0.3, 1.2), at_step=20), tmp_path, num_slots=2, config=AUTO)
    done.check(task)
    shares = shares_by_step(tmp_path)
    assert shares[18][1] == 48
    assert 17 <= shares[task.num_steps - 1][1] <= 21


class Spare(Uneven):
    """Worker 2 has something to do in each step that takes longer than the others' whole step; from a step on, not."""

    def own_s(self, samples):
        fixed_s = 0.06 if current().slot == 2 and self.step <= self.at_step else 0.0
        return super().own_s(samples) + fixed_s


def test_a_warm_spare_is_timed_too_and_gets_samples_when_it_is_fast_again(tmp_path):
    task = dataclasses.replace(TASK, epochs=8)
    config = dataclasses.replace(AUTO, warm_spares=True)
    slow = (0.25, 0.25, 5.0)
    done = run(Spare(task, *slow, then=(0.25, 0.25, 0.25), at_step=40), tmp_path, config=config)
    done.check(task)
    shares = shares_by_step(tmp_path)
    assert shares[38][2] == 0
    assert shares[task.num_steps - 1][2] >= 20


def test_shares_survive_lost_workers_and_count_every_sample_once(tmp_path):
    task = dataclasses.replace(TASK, patience_s=0.05)
    faults = [Fault(slot=0, step=9, point="backward"), Fault(slot=2, step=15, point="updated")]
    done = run(Uneven(task, 0.25, 0.5, 1.0), tmp_path, config=AUTO, faults=faults)
    done.check(task)
    assert len(done.kinds("lost")) == 2


def told_of(directory, *, num_samples, global_batch_size):
    """What a lone worker tells of its steps, as (samples, seconds), over six epochs with a pause after each loop."""
    told = []

    def train():
        model = het.prepare_model(torch.nn.Linear(3, 1))
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        data = DataLoader(TensorDataset(torch.randn(num_samples, 3)))
        loader = het.prepare_data_loader(data, global_batch_size=global_batch_size)
        for _ in loader.epochs(6):
            current().worker.engine.timings.step_done = lambda samples, _, cycle_s, **more: told.append(
                (samples, cycle_s)
            )
            for (x,) in loader:
                optimizer.zero_grad()
                model(x).sum().backward()
                optimizer.step()
            time.sleep(PAUSE_S)

    alone(train, directory)
    return told


PAUSE_S = 0.2


def test_epochs_of_one_step_are_observed_without_what_lies_between_them(tmp_path):
    told = told_of(tmp_path, num_samples=8, global_batch_size=12)
    assert [samples for samples, _ in told] == [8] * 5
    assert min(seconds for _, seconds in told) > 0
    assert sorted(seconds for _, seconds in told)[2] < PAUSE_S


def test_speeds_are_told_of_full_batches_only(tmp_path):
    told = told_of(tmp_path, num_samples=10, global_batch_size=4)
    assert [samples for samples, _ in told] == [4] * 12


class SlowOnceRefilled(Uneven):
    """Slot 0 becomes slower twelve steps after slot 1 has been refilled and has healed."""

    def __call__(self, directory):
        session = current()

        def note(point, step):
            record = session.worker.agent.record
            back = record is not None and any(m.slot == 1 and m.uid not in record.unhealed for m in record.members)
            if point == "opened" and back and happened(directory) and self.at_step > step + 12:
                self.at_step = step + 12

        current().points.listeners.append(note)
        return super().__call__(directory)


def test_shares_still_follow_speeds_after_a_slot_was_refilled(tmp_path):
    task = dataclasses.replace(TASK, epochs=10, patience_s=0.05)
    fault = Fault(slot=1, step=5, point="backward")
    done = run(SlowOnceRefilled(task, 0.3, 0.3, then=(1.2, 0.3)), tmp_path, num_slots=2, config=AUTO, faults=[fault])
    done.check(task)
    assert len(done.kinds("healed")) == 1
    assert 17 <= shares_by_step(tmp_path)[task.num_steps - 1][0] <= 21


@pytest.mark.parametrize("normalisation", ["mean", "none"])
@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_learning_rate_scales_weigh_gradients_as_a_plain_implementation_does(tmp_path, alpha, normalisation):
    task = dataclasses.replace(TASK, lr=0.01, epochs=2)
    config = dataclasses.replace(AUTO, alpha=alpha, lr_scale_normalisation=normalisation)
    done = run(Uneven(task, 0.25, 1.0), tmp_path, num_slots=2, config=config)
    tables = {0: {0: 1.0, 1: 1.0}} | {e["version"]: e["lr_scales"] for e in done.kinds("table")}
    of_generation = {e["number"]: e["table"] for e in done.kinds("formed")}
    assert len(tables) > 1
    scales = list(tables.values())[-1]
    assert (scales[1] > scales[0]) == (alpha > 0)
    expected = literally(task, tmp_path, lambda generation: tables[of_generation[generation]], normalisation == "mean")
    assert relative_error(done.parameters, expected) < 1e-12


def literally(task, directory, scales_of, normalised):
    """``g = sum b r g / sum b r``, or ``sum r g``, from the ledger and one worker's gradient after the other."""
    model, dataset = task.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=task.momentum)
    entries = {}
    for entry in sorted(read_ledgers(directory), key=lambda e: (e.step, e.generation)):
        entries[entry.step] = entry
    for _, entry in sorted(entries.items()):
        order = task.plan.permutation(entry.epoch)
        total = [torch.zeros_like(p) for p in model.parameters()]
        weights = 0.0
        for uid, (start, stop) in entry.slices.items():
            scale = scales_of(entry.generation)[int(uid.split("-")[0])]
            x, y = dataset[torch.from_numpy(order[start:stop].copy())]
            weight = scale * (stop - start) if normalised else scale
            weights += weight
            grads = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
            total = [t + weight * g for t, g in zip(total, grads, strict=True)]
        for p, t in zip(model.parameters(), total, strict=True):
            p.grad = t / weights if normalised else t
        optimizer.step()
    return flat(model.parameters())


@pytest.mark.skipif(not available(), reason="needs root and a CPU controller")
def test_a_quota_slows_a_process_down_and_leaves_nothing_behind():
    quota = CpuQuota(0.25)
    try:
        quota.add(os.getpid())
        began, used = time.monotonic(), time.process_time()
        while time.monotonic() - began < 0.8:
            sum(range(1000))
        fraction = (time.process_time() - used) / (time.monotonic() - began)
    finally:
        quota.close()
    # However busy the machine is, it never gets more.
    assert fraction < 0.3
    assert not quota.path.exists()
