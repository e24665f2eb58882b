"""What people give a DataLoader is followed: by workers together, by one that comes late, by a run that goes on."""

import functools
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labs import alone, run
from test_faults import UntilRefilled
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler

import raytrain_het as het
from raytrain_het.config import HetConfig
from raytrain_het.errors import CheckpointError, ConfigError, LoopOrderError, NonFiniteGradientError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.ledger import check_exactly_once, read_ledgers
from raytrain_het.testing.regression import Regression, differing_replicas, flat, relative_error, trace_steps
from raytrain_het.worker.data.data_loader import plan_of
from raytrain_het.worker.session import current
from raytrain_het.worker.state.checkpoint import read_meta

TASK = Regression(num_samples=60)
EPOCHS = 3
CONFIG = HetConfig(bucket_mib=0.0002, shares=None, silence_s=5)


class Lengths:
    """Batches of unlike sizes, in another order in each epoch, a different number of them too."""

    def __init__(self, size):
        self.sampler, self.epoch = RandomSampler(range(size)), 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = list(self.sampler)
        for k in range(6 + self.epoch):
            size = 3 + k % 4
            yield order[:size]
            order = order[size:] + order[:size]


def loader_of(kind, data):
    if kind == "weighted":
        sampler = WeightedRandomSampler([1.0, 4.0] * (len(data) // 2), 50)
        return DataLoader(data, batch_size=12, sampler=sampler, drop_last=True)
    return DataLoader(data, batch_sampler=Lengths(len(data)))


class Sampled:
    """Trains with a sampler."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, directory):
        session = current()
        trace_steps(session, directory)
        model, data = TASK.build()
        model = het.prepare_model(model)
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
        loader = het.prepare_data_loader(loader_of(self.kind, data))
        for epoch in loader.epochs(EPOCHS):
            assert len(loader) == loader.plan.steps_in(epoch)
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
        return {"parameters": flat(model.parameters())}


def plain(kind):
    """The same with torch alone, each global batch in one piece."""
    model, data = TASK.build()
    plan, cursor = plan_of(loader_of(kind, data), seed=0), Cursor()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(EPOCHS):
        cursor = Cursor(epoch=epoch)
        while window := plan.batch_at(cursor):
            x, y = data[torch.from_numpy(plan.permutation(epoch)[window.start : window.stop].copy())]
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            cursor = plan.advance(cursor)
    return plan, flat(model.parameters())


@pytest.mark.parametrize(("kind", "step"), [("weighted", 6), ("batches", 9)])
def test_a_sampler_is_followed_by_all_and_by_a_worker_that_comes_late(tmp_path, kind, step):
    faults = [Fault(slot=1, step=step, point="backward")]
    done = run(UntilRefilled(Sampled(kind), 1), tmp_path, faults=faults, config=CONFIG)
    assert [e["slot"] for e in done.kinds("healed")] == [1]
    plan, expected = plain(kind)
    check_exactly_once(read_ledgers(tmp_path), plan, epochs=EPOCHS)
    assert differing_replicas(tmp_path) == []
    assert relative_error(done.parameters, expected) < 1e-9


def prepare(loader, config=None, **settings):
    model = het.prepare_model(torch.nn.Linear(3, 1))
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3))
    return model, optimizer, het.prepare_data_loader(loader, **settings)


def train(loader, *, epochs=1, before=lambda epoch: None, body=lambda batch: None, report=False, **settings):
    """An ordinary loop over batches whose first part is x; returns the batches by epoch."""
    model, optimizer, prepared = prepare(loader, **settings)
    seen = {}
    for epoch in prepared.epochs(epochs):
        before(epoch)
        for batch in prepared:
            seen.setdefault(epoch, []).append(batch)
            body(batch)
            optimizer.zero_grad()
            model(batch[0].reshape(len(batch[0]), -1)[:, :3].float()).mean().backward()
            optimizer.step()
            if report:
                het.report({"done": 1.0})
    return seen


NUMBERS = TensorDataset(torch.arange(20.0)[:, None].expand(20, 3), torch.arange(20))


def samples(seen):
    return {epoch: [batch[1].tolist() for batch in batches] for epoch, batches in seen.items()}


@pytest.mark.parametrize("size", [8, np.int64(8), torch.tensor(8)])
def test_sizes_may_be_numpys_and_torchs(tmp_path, size):
    settings = {"global_batch_size": size, "micro_batch_size": size // 2, "epochs": size // 8}
    seen = alone(lambda: samples(train(DataLoader(NUMBERS), **settings)), tmp_path)
    assert [len(batch) for batch in seen[0]] == [4, 4, 4, 4, 4]


@pytest.mark.parametrize(
    "sizes",
    [
        {"global_batch_size": 8.0},
        {"global_batch_size": 8, "micro_batch_size": 2.5},
        {"global_batch_size": True},
        {"epochs": 2.0},
    ],
)
def test_what_is_no_whole_number_is_refused_by_name(tmp_path, sizes):
    with pytest.raises(ConfigError, match=f"{list(sizes)[-1]}.*2.5|{list(sizes)[-1]}.* is not valid"):
        alone(lambda: train(DataLoader(NUMBERS, batch_size=4), **sizes), tmp_path)


def test_a_prepared_loader_has_the_attributes_of_a_data_loader(tmp_path):
    given = DataLoader(NUMBERS, batch_size=5, num_workers=0, drop_last=True, collate_fn=lambda samples: samples)
    names = ("dataset", "sampler", "batch_sampler", "num_workers", "collate_fn", "drop_last", "batch_size")
    seen = {}

    def look():
        _, _, loader = prepare(given, global_batch_size=10)
        seen.update({name: getattr(loader, name) for name in names}, steps=len(loader))

    with pytest.raises(LoopOrderError, match="nothing was trained together"):
        alone(look, tmp_path)
    assert seen.pop("steps") == 2
    assert seen == {name: getattr(given, name) for name in names} | {"batch_size": 10}


class Curriculum(Dataset):
    """A sample tells which epoch the dataset was told."""

    def __init__(self):
        self.epoch, self.size = -1, 8

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.full((3,), float(index)), self.epoch, os.getpid()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_is_set_on_the_dataset_before_an_epoch_is_seen_in_it(tmp_path, num_workers):
    data = Curriculum()
    loader = DataLoader(data, batch_size=4, num_workers=num_workers)
    seen = alone(lambda: train(loader, epochs=3, before=lambda epoch: setattr(data, "epoch", epoch)), tmp_path)
    assert {epoch: {int(v) for batch in batches for v in batch[1]} for epoch, batches in seen.items()} == {
        0: {0},
        1: {1},
        2: {2},
    }
    processes = {int(v) for batches in seen.values() for batch in batches for v in batch[2]}
    assert (processes == {os.getpid()}) == (num_workers == 0)


def test_a_dataset_that_changes_its_length_is_refused_when_it_does(tmp_path):
    data = Curriculum()
    with pytest.raises(LoopOrderError, match="8 samples, 9 in epoch 1.*sampler"):
        alone(
            lambda: train(DataLoader(data, batch_size=4), epochs=2, before=lambda e: setattr(data, "size", 8 + e)),
            tmp_path,
        )


class Growing:
    """The way out of it: a sampler that chooses the indices of each epoch."""

    def __init__(self):
        self.level = 0

    def set_epoch(self, epoch):
        self.level = epoch

    def __iter__(self):
        return iter(range(4 + 4 * self.level))


def test_a_curriculum_of_growing_epochs_is_a_sampler(tmp_path):
    seen = alone(lambda: samples(train(DataLoader(NUMBERS, batch_size=4, sampler=Growing()), epochs=3)), tmp_path)
    assert [sum(batches, []) for batches in seen.values()] == [list(range(4 + 4 * e)) for e in range(3)]


def test_a_run_goes_on_with_its_sampler_and_with_no_other(tmp_path):
    def loader(weights):
        return DataLoader(NUMBERS, sampler=WeightedRandomSampler(weights, 10))

    def go(weights, where, **settings):
        options = {"epochs": 2, "report": True, "global_batch_size": 5}
        return alone(lambda: samples(train(loader(weights), **options)), tmp_path / where, acknowledge=True, **settings)

    weights = [1.0] * 10 + [3.0] * 10
    first = go(weights, "first")
    path = str(tmp_path / "first" / "storage" / "checkpoint_000000001_0")
    checkpoint = {"checkpoint": path, "checkpoint_cursor": Cursor.from_dict(read_meta(path)["cursor"])}
    again = go(weights, "second", **checkpoint)
    assert again == {0: first[0][1:], 1: first[1]}
    with pytest.raises(CheckpointError, match=r"sampler='WeightedRandomSampler \w+'.*Give the DataLoader the sampler"):
        go(weights[::-1], "third", **checkpoint)
    with pytest.raises(CheckpointError, match="sampler="):
        alone(lambda: train(DataLoader(NUMBERS), epochs=2, global_batch_size=5), tmp_path / "fourth", **checkpoint)


def one_pass(loader, model, optimizer, steps=math.inf):
    for done, (x, _) in enumerate(loader, start=1):
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
        if done == steps:
            break


def second_pass(loader, model, optimizer):
    for _ in loader.epochs(2):
        one_pass(loader, model, optimizer)
        return sum(1 for _ in loader)


def break_and_again(loader, model, optimizer):
    for _ in loader.epochs(2):
        one_pass(loader, model, optimizer, steps=1)
        one_pass(loader, model, optimizer)


def counted(loader, model, optimizer):
    for _ in loader.epochs(2):
        len(list(loader))


def looked_at(loader, model, optimizer):
    for _ in loader.epochs(2):
        next(iter(loader))
        one_pass(loader, model, optimizer)


def looked_at_before(loader, model, optimizer):
    next(iter(loader))


def next_of_a_new_one(loader, model, optimizer):
    for _ in loader.epochs(2):
        for _ in range(len(loader)):
            x, _ = next(iter(loader))
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step()


@pytest.mark.parametrize(
    ("loop", "text"),
    [
        (second_pass, r"epoch that is over: epoch 0, after 5 steps.*evaluate\(fn, loader\)"),
        (break_and_again, "left in the middle of its epoch.*epoch 0, after 1 steps.*iter"),
        (counted, r"without backward\(\)"),
        (looked_at, "the DataLoader that you gave to prepare_data_loader"),
        (looked_at_before, "the DataLoader that you gave to prepare_data_loader"),
        (next_of_a_new_one, r"batches = iter\(loader\)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_an_epoch_has_one_pass_and_another_is_refused_where_it_is_written(tmp_path, loop, text):
    def go():
        model, optimizer, loader = prepare(DataLoader(NUMBERS, batch_size=4))
        loop(loader, model, optimizer)

    with pytest.raises(LoopOrderError, match=text):
        alone(go, tmp_path)


def test_the_ways_out_of_a_second_pass_work(tmp_path):
    def go():
        given = DataLoader(NUMBERS, batch_size=4)
        next(iter(given))
        model, optimizer, loader = prepare(given)
        means = []
        for _ in loader.epochs(2):
            batches = iter(loader)
            for _ in range(len(loader)):
                x, _ = next(batches)
                optimizer.zero_grad()
                model(x).mean().backward()
                optimizer.step()
            means.append(het.evaluate(lambda batch: {"mean": batch[1].sum(), "n": len(batch[1])}, loader))
        return means

    assert alone(go, tmp_path) == [{"mean": 9.5, "n": 1.0}] * 2


def test_an_error_in_the_body_arrives_as_it_is(tmp_path):
    def fail(batch):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        alone(lambda: train(DataLoader(NUMBERS, batch_size=4), body=fail), tmp_path)


def test_an_index_of_no_sample_ends_the_run_before_its_first_step(tmp_path):
    with pytest.raises(ConfigError, match="index 20 in epoch 0: allowed is 0 to 19"):
        alone(lambda: train(DataLoader(NUMBERS, sampler=[1, 20]), global_batch_size=1), tmp_path)


def test_a_batch_with_numbers_and_scalars_in_it_is_looked_at_for_the_samples_that_are_to_blame(tmp_path):
    def collate(found):
        x = torch.stack([x for x, _ in found])
        return torch.tensor(2.0), 3, "text", None, torch.where(x == 5, torch.nan, x)

    def go():
        model, optimizer, loader = prepare(DataLoader(NUMBERS, batch_size=2, collate_fn=collate))
        for _ in loader.epochs(1):
            for scale, _, _, _, x in loader:
                optimizer.zero_grad()
                (scale * model(x).mean()).backward()
                optimizer.step()

    with pytest.raises(NonFiniteGradientError, match=r"the data is not finite: samples \[5\]"):
        alone(go, tmp_path, config=HetConfig(max_skipped_steps=1))


def test_samplers_that_are_unlike_on_two_workers_are_named_when_they_join(tmp_path):
    def go(directory):
        slot = current().slot
        return train(DataLoader(NUMBERS, batch_sampler=BatchSampler(range(slot, 20), 4, False))) and None

    with pytest.raises(AssertionError, match="another model or dataset.*BatchSampler"):
        run(functools.partial(go), tmp_path, num_slots=2, config=CONFIG)
