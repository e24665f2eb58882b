"""What is evaluated, and that an evaluation leaves nothing behind."""

import random

import numpy as np
import pytest
import torch
from labs import alone, run
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

import raytrain_het as het
from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError, LoopOrderError
from raytrain_het.worker.data.held_out import HeldOut, evaluation_mode

X = torch.arange(1.0, 104.0)
NUMBERS = TensorDataset(X[:, None])


def total(batch):
    return {"mean": batch[0].sum(), "n": float(len(batch[0]))}


def evaluated(*arguments, loader=None, model=None, epochs=1, fn=total, **settings):
    """Train an epoch of two steps, then evaluate; the results of all epochs."""
    net = het.prepare_model(model or nn.Linear(1, 1))
    optimizer = het.prepare_optimizer(torch.optim.SGD(net.parameters(), lr=1e-6))
    prepared = het.prepare_data_loader(loader or DataLoader(TensorDataset(torch.ones(4, 1))), global_batch_size=2)
    found = []
    for _ in prepared.epochs(epochs):
        for batch in prepared:
            optimizer.zero_grad()
            net(batch[0][:, :1]).mean().backward()
            optimizer.step()
        data = [a() if callable(a) else a for a in arguments]
        found.append(het.evaluate(fn, *data, **settings))
    return found


SUBSET = [3, 50, 7, 7]
DATA = {
    "dataset": (lambda: NUMBERS, X),
    "one batch": (lambda: DataLoader(NUMBERS, batch_size=1000), X),
    "shuffled": (lambda: DataLoader(NUMBERS, batch_size=10, shuffle=True), X),
    "drop_last": (lambda: DataLoader(NUMBERS, batch_size=10, drop_last=True), X[:100]),
    "generator": (
        lambda: DataLoader(NUMBERS, batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(1)),
        X,
    ),
    "chosen": (lambda: DataLoader(NUMBERS, batch_size=3, sampler=SubsetRandomSampler(SUBSET)), X[SUBSET]),
    "batches": (lambda: DataLoader(NUMBERS, batch_sampler=[[0, 1], [5], [2, 3, 4]]), X[:6]),
    "processes": (
        lambda: DataLoader(
            NUMBERS,
            batch_size=60,
            collate_fn=torch.utils.data.default_collate,
            num_workers=1,
            worker_init_fn=lambda number: None,
        ),
        X,
    ),
    "subset": (lambda: DataLoader(Subset(NUMBERS, range(40)), batch_size=7), X[:40]),
}


@pytest.mark.parametrize("kind", DATA)
def test_a_data_loader_is_evaluated_over_just_its_samples(tmp_path, kind):
    make, samples = DATA[kind]
    (means,) = alone(lambda: evaluated(make), tmp_path)
    assert means == {"mean": pytest.approx(samples.mean().item(), rel=1e-6), "n": 1.0}


class Texts(Dataset):
    """Samples of unlike lengths."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.ones(1 + index % 5)


def padded(samples):
    return (pad_sequence(samples, batch_first=True),)


LENGTH = sum(1 + k % 5 for k in range(30)) / 30


@pytest.mark.parametrize(
    ("data", "settings", "trains_on"),
    [
        (lambda: DataLoader(Texts(), batch_size=8, collate_fn=padded), {}, None),
        (Texts, {"collate_fn": padded, "batch_size": np.int64(7)}, None),
        (Texts, {"batch_size": torch.tensor(4)}, lambda: DataLoader(Texts(), collate_fn=padded)),
    ],
    ids=["loader", "collate_fn", "as the training loader"],
)
def test_held_out_data_may_be_of_unlike_lengths(tmp_path, data, settings, trains_on):
    (means,) = alone(lambda: evaluated(data, loader=trains_on and trains_on(), **settings), tmp_path)
    assert means["mean"] == pytest.approx(LENGTH)


def test_held_out_samples_that_the_training_loader_cannot_put_together_are_stacked(tmp_path):
    loader = DataLoader(Texts(), collate_fn=padded)
    (means,) = alone(lambda: evaluated(TensorDataset(X, X), loader=loader), tmp_path)
    assert means["mean"] == pytest.approx(X.mean().item())


def test_an_error_of_the_training_loaders_collate_fn_arrives_if_nothing_else_works(tmp_path):
    with pytest.raises(TypeError, match="expected Tensor as element 0"):
        alone(lambda: evaluated([object(), object()], loader=DataLoader(Texts(), collate_fn=padded)), tmp_path)


def test_a_prepared_loader_is_evaluated_over_its_dataset(tmp_path):
    def train():
        net = het.prepare_model(nn.Linear(1, 1))
        optimizer = het.prepare_optimizer(torch.optim.SGD(net.parameters(), lr=1e-6))
        loader = het.prepare_data_loader(DataLoader(Texts(), collate_fn=padded), global_batch_size=10)
        for _ in loader.epochs(1):
            for (x,) in loader:
                optimizer.zero_grad()
                net(x.sum(1, keepdim=True)).mean().backward()
                optimizer.step()
            return het.evaluate(total, loader)

    assert alone(train, tmp_path)["mean"] == pytest.approx(LENGTH)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1)


class Rotating:
    def __init__(self):
        self.first = 0

    def __iter__(self):
        self.first += 1
        return iter(range(self.first, 20))


@pytest.mark.parametrize(
    ("data", "settings", "error", "text"),
    [
        (Stream(), {}, LoopOrderError, "Stream.*__len__"),
        (DataLoader(Stream()), {}, LoopOrderError, "Stream.*__len__"),
        (
            DataLoader(NUMBERS, sampler=DistributedSampler(NUMBERS, 2, 0)),
            {},
            LoopOrderError,
            "DistributedSampler.*nobody owns a part",
        ),
        (DataLoader(NUMBERS, sampler=Rotating()), {}, LoopOrderError, "Rotating.*set_epoch"),
        (DataLoader(NUMBERS, sampler=[200]), {}, ConfigError, "index 200 .*0 to 102"),
        (DataLoader(NUMBERS, batch_size=None), {}, LoopOrderError, "batch_size=32"),
        (DataLoader(NUMBERS), {"batch_size": 3}, ConfigError, "give them to the DataLoader"),
        (NUMBERS, {"batch_size": 2.5}, ConfigError, r"batch_size=2\.5"),
        (NUMBERS, {"fn": lambda batch: batch[0]}, ConfigError, "got a Tensor.*dictionary of numbers"),
        (NUMBERS, {"fn": lambda batch: {"loss": batch[0]}}, ConfigError, "is a Tensor of .* elements"),
        (NUMBERS, {"fn": lambda batch: None}, ConfigError, "got a NoneType.*dictionary of numbers"),
        (3, {}, ConfigError, "int has no length"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(tmp_path, data, settings, error, text):
    with pytest.raises(error, match=text):
        alone(lambda: evaluated(data, **settings), tmp_path)


class Merging(nn.Linear):
    """As adapters do: weights are put together for evaluation and taken apart for training."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_every_module_has_its_own_flag_again_also_after_an_error(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Sequential(nn.Dropout(), Merging(1, 1)), nn.Linear(1, 1))
    model[0].eval()
    model[1].eval()
    model[1][1].train()
    expected = [False, False, True, True]

    def flags():
        return [m.training for m in (model[0], model[1], model[1][1], model[2])]

    seen = []

    def fn(batch):
        seen.append((flags(), model[1][1].merged, torch.is_grad_enabled()))
        torch.set_grad_enabled(True)
        model.train()
        if len(seen) == 2:
            raise KeyError("mine")
        return total(batch)

    def train():
        evaluated(NUMBERS, model=model, fn=fn)
        assert flags() == expected and not model[1][1].merged and torch.is_grad_enabled()
        with torch.no_grad():
            het.evaluate(fn, NUMBERS, name="that raises")

    with pytest.raises(KeyError, match="mine"):
        alone(train, tmp_path)
    assert flags() == expected and not model[1][1].merged
    assert torch.is_grad_enabled()
    assert seen[0] == ([False] * 4, True, False)
    assert model[0].running_mean.tolist() == [0.0]


class AlwaysEvaluating(nn.Dropout):
    def train(self, mode=True):
        return super().train(False)


def test_what_modules_do_when_they_are_put_into_training_is_done_afterwards_and_flags_set_by_hand_stay():
    model = nn.Sequential(Merging(1, 1), AlwaysEvaluating(), nn.Linear(1, 1))
    model[1].training = True
    model[2].training = False
    with evaluation_mode(model):
        assert model[0].merged and not model[1].training
    assert not model[0].merged
    assert [module.training for module in model.modules()] == [True, True, True, False]


def test_a_model_that_is_in_evaluation_mode_stays_in_it():
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).eval()
    model[0].train()
    with evaluation_mode(model), torch.enable_grad():
        assert not model[0].training
    assert [model.training, model[0].training, model[1].training] == [False, True, False]


def drawing(batch):
    return {"torch": torch.rand(()), "numpy": np.random.rand(), "python": random.random(), "n": 1.0}


def draws(directory=None):
    torch.manual_seed(len(str(directory))), np.random.seed(1), random.seed(1)
    return evaluated(NUMBERS, epochs=2, fn=drawing, batch_size=10)


def test_what_an_evaluation_draws_does_not_depend_on_who_takes_which_chunk(tmp_path):
    one = alone(lambda: draws("another seed of the worker's own"), tmp_path / "one")
    two = run(draws, tmp_path / "two", num_slots=2, config=HetConfig(silence_s=5)).results
    assert two[0] == two[1] == one
    assert one[0] != one[1], "each step draws anew"
    assert len({round(value, 9) for value in one[0].values()}) == 4


def test_an_evaluation_leaves_the_training_its_random_numbers(tmp_path):
    def train(fn):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        evaluated(NUMBERS, model=nn.Linear(1, 1), fn=fn)
        return torch.rand(1).item(), np.random.rand(), random.random()

    assert alone(lambda: train(drawing), tmp_path / "1") == alone(lambda: train(total), tmp_path / "2")


def held_out(data, **settings):
    settings = {"batch_size": None, "collate_fn": None, "default_collate_fn": None, "seed": 0, "epoch": 0, **settings}
    return HeldOut(data, **settings)


def test_evaluations_of_other_data_or_in_other_chunks_have_keys_of_their_own():
    other = [
        held_out(NUMBERS),
        held_out(NUMBERS, batch_size=50),
        held_out(Subset(NUMBERS, range(50))),
        held_out(DataLoader(NUMBERS, sampler=[1, 2, 3])),
        held_out(DataLoader(NUMBERS, sampler=[1, 2, 4])),
        held_out(DataLoader(NUMBERS, batch_sampler=[[1, 2], [3]])),
        held_out(DataLoader(NUMBERS, batch_sampler=[[1], [2, 3]])),
    ]
    assert len({data.key for data in other}) == len(other)
    assert held_out(DataLoader(NUMBERS, batch_size=256)).key == other[0].key


def test_a_random_choice_of_held_out_data_is_another_one_in_each_epoch_and_the_same_on_all():
    def chosen(epoch, sampler=RandomSampler):
        loader = DataLoader(NUMBERS, batch_sampler=BatchSampler(sampler(NUMBERS, num_samples=5), 2, False))
        data = held_out(loader, epoch=epoch)
        return [data.batch(k, torch.device("cpu"))[0].flatten().tolist() for k in range(data.num_chunks)]

    assert chosen(1) == chosen(1) != chosen(2)
    assert list(map(len, chosen(1))) == [2, 2, 1]
