"""Checkpoints: resume by the cursor, and a storage that fails costs a checkpoint, never the run or an older one."""

import copy
import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from labs import alone, plain, run
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.config import HetConfig
from raytrain_het.errors import CheckpointError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.ledger import read_ledgers
from raytrain_het.testing.regression import Regression, relative_error
from raytrain_het.worker import session as sessions
from raytrain_het.worker.state.checkpoint import LocalStorage, read_meta, read_state
from raytrain_het.worker.state.extras import Extra

TASK = Regression(scheduled=True)
STEPS = TASK.plan.steps_per_epoch


def resume_from(path):
    meta = read_meta(path)
    return {"checkpoint": str(path), "checkpoint_cursor": Cursor.from_dict(meta["cursor"])}


@pytest.mark.parametrize(("first", "second"), [(3, 3), (3, 1), (2, 4)])
def test_a_run_resumed_at_the_cursor_ends_like_one_that_was_not_interrupted(tmp_path, first, second):
    half = dataclasses.replace(TASK, epochs=2)
    run(half, tmp_path / "first", num_slots=first)
    path = sorted((tmp_path / "first" / "storage").iterdir())[-1]
    done = run(TASK, tmp_path / "second", num_slots=second, context=resume_from(path))
    assert relative_error(done.parameters, plain(TASK)) < 1e-12
    assert {e.step for e in read_ledgers(tmp_path / "second")} == set(range(2 * STEPS, TASK.num_steps))


def test_a_resumed_run_heals_too_and_goes_back_to_the_newest_checkpoint(tmp_path):
    half = dataclasses.replace(TASK, epochs=1)
    run(half, tmp_path / "first")
    (path,) = (tmp_path / "first" / "storage").iterdir()
    task = dataclasses.replace(TASK, patience_s=0.05)
    faults = [Fault(slot=0, step=STEPS + 1, point="backward"), Fault(slot=1, step=2 * STEPS + 3, point="updated")]
    done = run(task, tmp_path / "second", faults=faults, context=resume_from(path))
    assert relative_error(done.parameters, plain(TASK)) < 1e-9


def test_what_is_in_a_checkpoint(tmp_path):
    done = run(TASK, tmp_path)
    last = Path(done.lab.reports[-1]["checkpoint"])
    meta = json.loads((last / "het.json").read_text())
    assert meta["cursor"] == {"epoch": TASK.epochs, "offset": 0, "step": TASK.num_steps}
    assert meta["world_size"] == 3
    state = read_state(str(last))
    weights = torch.cat([t.flatten() for t in state["model"].values()])
    assert torch.equal(weights, done.parameters)
    assert state["registered"]["scheduler"]["last_epoch"] == TASK.num_steps
    workers = [f"worker_{slot}.{end}" for slot in range(3) for end in ("pkl", "pt")]
    others = ["extra_random.pkl", "extra_random.pt", "het.json", "model.pt", "training.pt"]
    assert sorted(p.name for p in last.iterdir()) == sorted([*others, *workers])
    assert meta["workers"] == [0, 1, 2]
    assert meta["run"]["id"] == "lab"
    assert meta["run"]["key"].split(".") == [str(meta["run"]["life"]), str(TASK.num_steps), "0"]
    for path in last.glob("*.pt"):
        torch.load(path, weights_only=True)


def test_a_checkpoint_is_used_as_the_documents_say_without_this_package(tmp_path):
    _, settings = written(tmp_path, 3)
    path = settings["checkpoint"]
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    (snippet,) = re.findall(r"```python\n(path = .*?weights_only=True.*?)```", text, flags=re.DOTALL)
    lines = [line if not line.startswith("path = ") else f"path = {path!r}" for line in snippet.splitlines()]
    code = ["import sys, torch", "build_model = lambda: torch.nn.Linear(1, 1)", *lines]
    code.append("print(sum(p.sum().item() for p in model.parameters()), 'raytrain_het' in sys.modules)")
    done = subprocess.run([sys.executable, "-I", "-c", "\n".join(code)], capture_output=True, text=True, check=True)
    total = sum(t.sum().item() for t in read_state(path)["model"].values())
    assert done.stdout.split() == [str(total), "False"]


FORMAT_1 = Path(__file__).parents[1] / "data" / "checkpoint_of_format_1"
"""Of the function below, by the version of before format 2, with two workers of which the second is lost here."""


def train_as_before():
    torch.manual_seed(0)
    model = het.prepare_model(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32)))
    optimizer = het.prepare_optimizer(torch.optim.Adam(model.parameters(), lr=0.05))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    het.register_state("scheduler", scheduler)
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    loader = het.prepare_data_loader(DataLoader(TensorDataset(x, x.sin()), shuffle=True), global_batch_size=8)
    begun = None
    for _ in loader.epochs(2):
        states = sessions.current().worker.communicator.codec_states.by_parameter()
        begun = begun or {
            "model": {name: t.clone() for name, t in model.state_dict().items()},
            "optimizer": copy.deepcopy(optimizer.state_dict()),
            "left_out": states["0.weight"]["residual"],
            "random": torch.get_rng_state(),
            "epoch": scheduler.last_epoch,
        }
        for x, y in loader:
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        het.report({"loss": loss.item()})
    return begun


def test_a_checkpoint_of_format_1_is_read_to_the_bit(tmp_path):
    config = HetConfig(compression="topk(density=0.25)")
    begun = alone(train_as_before, tmp_path, config=config, acknowledge=True, **resume_from(FORMAT_1))
    state = torch.load(FORMAT_1 / "state.pt", weights_only=False)
    workers = [torch.load(FORMAT_1 / f"worker_{slot}.pt", weights_only=False) for slot in range(2)]
    torch.testing.assert_close(begun["model"], dict(state["model"]), rtol=0, atol=0)
    torch.testing.assert_close(begun["optimizer"]["state"], state["optimizer"]["state"], rtol=0, atol=0)
    assert torch.equal(begun["left_out"], sum(w["codec"]["0.weight"]["residual"] for w in workers))
    assert torch.equal(begun["random"], workers[0]["random"]["torch"])
    assert begun["epoch"] == state["registered"]["scheduler"]["last_epoch"] == 3
    (again,) = (tmp_path / "storage").iterdir()
    assert read_meta(again)["format"] == 2


def test_what_a_killed_run_has_stored_and_not_registered_is_not_the_next_runs(tmp_path):
    """The next one begins with another rate, and comes to the same step."""

    def train(rate):
        model = het.prepare_model(torch.nn.Linear(1, 1, bias=False))
        torch.nn.init.zeros_(model.weight)
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=rate))
        loader = het.prepare_data_loader(DataLoader(TensorDataset(torch.ones(4, 1))), global_batch_size=4)
        for _ in loader.epochs(1):
            for (x,) in loader:
                optimizer.zero_grad()
                model(x).mean().backward()
                optimizer.step()
        het.report({"loss": 0.0})
        return model.weight.item()

    for rate in (0.1, 0.01):
        weight = alone(functools.partial(train, rate), tmp_path, acknowledge=True)
        (path,) = (tmp_path / "storage").iterdir()
        assert read_state(str(path))["model"]["weight"].item() == weight


def test_what_else_belongs_to_a_run_is_stored_under_its_name_and_comes_back(tmp_path):
    back = []

    def train():
        names = Extra(save=lambda: {"names": ["age"], "scale": torch.ones(1)}, load=back.append)
        sessions.current().extras.add("features", names)
        return train_numbers(epochs=1)

    alone(train, tmp_path, acknowledge=True)
    path = tmp_path / "storage" / "checkpoint_000000003_0"
    assert torch.load(path / "extra_features.pt", weights_only=True)["names"] == ["age"]
    assert back == []
    alone(train, tmp_path / "again", acknowledge=True, **resume_from(path))
    assert [extra["names"] for extra in back] == [["age"]]


class Lively(torch.nn.Module):
    """Dropout, a channels_last convolution, and running values of which one is in no state dictionary."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 2)
        self.drop = torch.nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("unsaved", torch.zeros(3), persistent=False)
        self.register_buffer("scale", torch.ones(1).expand(3))

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        if self.training:
            self.mean += 0.1 * (y.detach().mean(0) - self.mean)
            self.unsaved.mul_(0.5).add_(y.detach().mean(0))
        return self.drop(y) * self.scale + self.unsaved.detach() + torch.rand(1)


def train_lively(epochs):
    torch.manual_seed(5)
    model = het.prepare_model(Lively().to(memory_format=torch.channels_last))
    optimizer = het.prepare_optimizer(torch.optim.Adam(model.parameters(), lr=0.01, fused=True))
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    loader = het.prepare_data_loader(DataLoader(TensorDataset(x), shuffle=True), global_batch_size=4)
    drawn = []
    for _ in loader.epochs(epochs):
        drawn.append(torch.rand(1).item())
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        het.report({"loss": 0.0})
    return drawn, dict(model.named_parameters()) | dict(model.named_buffers())


def test_a_resumed_run_equals_one_that_went_on_with_its_buffers_random_numbers_and_strides(tmp_path):
    drawn, expected = alone(functools.partial(train_lively, 4), tmp_path / "whole", acknowledge=True)
    alone(functools.partial(train_lively, 2), tmp_path / "first", acknowledge=True)
    path = sorted((tmp_path / "first" / "storage").iterdir())[-1]
    again, got = alone(functools.partial(train_lively, 4), tmp_path, acknowledge=True, **resume_from(path))
    assert again == drawn[2:]
    for name, t in expected.items():
        assert torch.equal(got[name], t), name


def train_numbers(size=10, epochs=2, batch_size=2, drop_last=False, shuffle=True):
    """A checkpoint after every step; returns the samples of each committed one by (epoch, offset)."""
    used = {}
    sessions.current().listeners.append(lambda note: used.update({(note.epoch, note.offset): note.own_samples}))
    model = het.prepare_model(torch.nn.Linear(1, 1))
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    data = DataLoader(TensorDataset(torch.ones(size, 1)), shuffle=shuffle, drop_last=drop_last)
    loader = het.prepare_data_loader(data, global_batch_size=batch_size)
    for _ in loader.epochs(epochs):
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step()
            het.report({"loss": 0.0})
    return used


def written(tmp_path, step):
    """A run's samples by (epoch, offset), and its checkpoint at a step."""
    used = alone(train_numbers, tmp_path / "first", acknowledge=True)
    return used, resume_from(tmp_path / "first" / "storage" / f"checkpoint_{step:09d}_0")


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "windows"),
    [
        (3, False, [(0, 6, 3), (0, 9, 1), (1, 0, 3), (1, 3, 3), (1, 6, 3), (1, 9, 1)]),
        (3, True, [(0, 6, 3), (1, 0, 3), (1, 3, 3), (1, 6, 3)]),
        (5, True, [(1, 0, 5), (1, 5, 5)]),  # Four samples are left of the epoch: no step.
    ],
)
def test_a_run_resumed_with_another_batch_size_cuts_the_rest_of_the_same_order(
    tmp_path, batch_size, drop_last, windows
):
    before, settings = written(tmp_path, 3)
    order = [[k for offset in range(0, 10, 2) for k in before[epoch, offset]] for epoch in range(2)]
    again = functools.partial(train_numbers, batch_size=batch_size, drop_last=drop_last)
    used = alone(again, tmp_path / "second", acknowledge=True, **settings)
    assert used == {(e, offset): order[e][offset : offset + count] for e, offset, count in windows}


@pytest.mark.parametrize(
    ("other", "seed", "text"),
    [
        ({"size": 8}, 0, "with dataset_size=10, here it is 8.*same dataset of 10 samples.*another name"),
        ({"shuffle": False}, 0, r"with shuffle=True, here it is False.*DataLoader\(dataset, shuffle=True\)"),
        ({}, 7, r"with seed=0, here it is 7.*HetConfig\(seed=0\)"),
    ],
)
def test_a_run_does_not_go_on_in_another_order_of_samples(tmp_path, other, seed, text):
    _, settings = written(tmp_path, 3)
    with pytest.raises(CheckpointError, match=text):
        alone(functools.partial(train_numbers, **other), tmp_path, config=HetConfig(seed=seed), **settings)


def test_a_checkpoint_from_before_the_plan_was_written_down_is_accepted(tmp_path):
    before, settings = written(tmp_path, 3)
    path = Path(settings["checkpoint"]) / "het.json"
    meta = json.loads(path.read_text())
    del meta["data"]
    path.write_text(json.dumps(meta))
    used = alone(train_numbers, tmp_path / "second", acknowledge=True, **settings)
    assert used == {key: samples for key, samples in before.items() if key >= (0, 6)}


class FailingStorage(LocalStorage):
    """Full after its first checkpoint: the next ones are half written."""

    def _upload(self, file, path):
        if any(p.name.startswith("checkpoint") for p in self.root.glob("*")):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        super()._upload(file, path)


def test_a_storage_that_is_full_costs_neither_the_run_nor_the_last_good_checkpoint(tmp_path):
    done = run(TASK, tmp_path, storage=lambda: FailingStorage(tmp_path / "storage"))
    assert relative_error(done.parameters, plain(TASK)) < 1e-12
    first, *others = done.lab.reports
    assert [p.name for p in (tmp_path / "storage").iterdir()] == [Path(first["checkpoint"]).name]
    assert read_meta(first["checkpoint"])["cursor"]["step"] == STEPS
    assert len(others) == TASK.epochs - 1
    assert all("No space left on device" in r["checkpoint_error"] for r in others)
    assert all(r["checkpoint"] is None for r in others)
    failed = done.kinds("checkpoint_failed")
    assert sorted(e["step"] for e in failed) == [r["step"] for r in others]


class ReadOnlyStorage(LocalStorage):
    def stage(self, name, life=0):
        raise PermissionError(30, "Read-only file system")


def test_a_storage_that_is_read_only_costs_no_run(tmp_path):
    done = run(TASK, tmp_path, storage=lambda: ReadOnlyStorage(tmp_path / "storage"))
    assert relative_error(done.parameters, plain(TASK)) < 1e-12
    assert len(done.kinds("checkpoint_failed")) == TASK.epochs


def test_all_workers_killed_after_a_storage_has_failed_start_from_the_last_good_checkpoint(tmp_path):
    killed = []

    def power_cut(lab):
        if not killed and len(lab.hub.reports(0)) >= 2:
            killed.append(lab.kill())

    task = dataclasses.replace(TASK, pace_s=0.02)
    done = run(task, tmp_path, on_poll=power_cut, storage=lambda: FailingStorage(tmp_path / "storage"))
    assert relative_error(done.parameters, plain(TASK)) < 1e-9
    assert [e["base"] for e in done.kinds("formed") if e["reset"]] == [0, STEPS]


def test_a_run_that_goes_on_with_other_settings_says_which_are_in_force(tmp_path):
    task = Regression(epochs=1)
    run(task, tmp_path / "first", num_slots=1)
    (path,) = (tmp_path / "first" / "storage").iterdir()
    for name, lr in (("same", task.lr), ("other", 0.01)):
        again = dataclasses.replace(task, epochs=2, lr=lr)
        done = run(again, tmp_path / name, num_slots=1, context=resume_from(path))
        assert {rate for _, rate in done.results[0]["rates"]} == {task.lr}
        said = [e["text"] for e in done.kinds("warning")]
        if name == "same":
            assert said == []
        else:
            assert f"the learning rate in force is {task.lr}, the program asked for 0.01" in said[0]
