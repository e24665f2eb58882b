"""However a global batch is cut, training is that of one worker with the whole batch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from labs import alone, plain, run
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError, NonFiniteGradientError
from raytrain_het.testing.ledger import read_ledgers
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, flat, relative_error

THOUSAND = Regression(num_samples=4000, global_batch_size=1000, epochs=2, report=False)


def with_shares(*shares, **more):
    return dataclasses.replace(SMALL_BUCKETS, shares=shares, **more)


@pytest.mark.parametrize(
    "shares", [(700, 200, 100, 0), (0, 0, 1), (1, 997, 1, 1), (1, 1, 1), (1e-9, 1)], ids=lambda s: "-".join(map(str, s))
)
def test_shares_of_a_batch_train_like_one_worker_with_the_whole_batch(tmp_path, shares):
    done = run(THOUSAND, tmp_path, num_slots=len(shares), config=with_shares(*shares))
    done.check(THOUSAND, error=1e-12)
    if sum(shares) == 1000:
        for entry in read_ledgers(tmp_path):
            assert [stop - start for start, stop in entry.slices.values()] == list(shares)


def test_one_worker_with_1000_is_the_same_as_plain_torch(tmp_path):
    run(THOUSAND, tmp_path, num_slots=1).check(THOUSAND, error=1e-12)


def test_micro_batches_are_equal_to_whole_shares(tmp_path):
    cut = dataclasses.replace(THOUSAND, micro_batch_size=64)
    run(cut, tmp_path, num_slots=2, config=with_shares(9, 1)).check(cut, error=1e-12)


def test_micro_batch_size_of_the_config_counts_too(tmp_path):
    run(THOUSAND, tmp_path, num_slots=2, config=with_shares(9, 1, micro_batch_size=100)).check(THOUSAND, error=1e-12)


def test_schedules_move_once_a_step_however_many_passes_a_share_has(tmp_path):
    task = Regression(scheduled=True, micro_batch_size=3, clip=0.5)
    done = run(task, tmp_path, num_slots=2, config=with_shares(3, 1))
    done.check(task)
    for result in done.results.values():
        assert result["rates"] == [(step, pytest.approx(0.05 * 0.97**step)) for step in range(task.num_steps)]


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_last_batch_of_an_epoch_is_smaller_or_dropped(tmp_path, drop_last):
    task = Regression(num_samples=103, global_batch_size=20, epochs=3, drop_last=drop_last)
    report = run(task, tmp_path, config=with_shares(5, 1, 2)).check(task, error=1e-12)
    assert report.num_samples == 3 * (100 if drop_last else 103)


def test_last_batch_with_fewer_samples_than_workers(tmp_path):
    task = Regression(num_samples=41, global_batch_size=20, epochs=3)
    run(task, tmp_path, num_slots=3).check(task, error=1e-12)


def test_bf16_is_close_and_the_same_on_all_workers(tmp_path):
    task = Regression(num_samples=400, global_batch_size=40, dtype=torch.float32)
    done = run(task, tmp_path, config=with_shares(3, 2, 1, compression="bf16"))
    done.check(task, error=2e-2)
    assert relative_error(done.parameters, plain(task)) > 1e-6


class Weighted:
    """Samples weigh differently: the loss is the mean over what counts, as for tokens."""

    def __init__(self, per_worker):
        self.per_worker = per_worker

    def __call__(self, directory):
        x = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        tokens = torch.arange(64, dtype=torch.float64) % 7 + 1
        torch.manual_seed(0)
        model = het.prepare_model(torch.nn.Linear(5, 1).double())
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        loader = het.prepare_data_loader(
            DataLoader(TensorDataset(x, tokens), shuffle=True),
            global_batch_size=16,
            weight=lambda batch: batch[1].sum(),
            micro_batch_size=self.per_worker,
        )
        for _ in loader.epochs(3):
            for a, n in loader:
                loss = (n * F.mse_loss(model(a)[:, 0], a.sum(dim=1), reduction="none")).sum() / n.sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {"parameters": flat(model.parameters())}


def test_weight_of_a_batch_replaces_its_number_of_samples(tmp_path):
    whole = run(Weighted(None), tmp_path / "whole", num_slots=1).parameters
    cut = run(Weighted(3), tmp_path / "cut", num_slots=3, config=with_shares(3, 2, 1)).parameters
    assert relative_error(cut, whole) < 1e-12


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(tmp_path, bad):
    def train():
        model = het.prepare_model(torch.nn.Linear(3, 1))
        het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        data = DataLoader(TensorDataset(torch.zeros(8, 3)))
        loader = het.prepare_data_loader(data, global_batch_size=4, weight=lambda batch: bad)
        for _ in loader.epochs(1):
            for _ in loader:
                pass

    with pytest.raises(ConfigError, match=r"weight=\.\.\.\) returned .* allowed is a finite number from 0"):
        alone(train, tmp_path)


class SomeWithoutWeight:
    """Every other sample counts for nothing, and what counts for nothing may be anything."""

    def __call__(self, directory):
        x = torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        counts = (torch.arange(32) % 4 < 2).double()
        x[counts == 0] = torch.nan
        torch.manual_seed(0)
        model = het.prepare_model(torch.nn.Linear(3, 1).double())
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        loader = het.prepare_data_loader(
            DataLoader(TensorDataset(x, counts)),
            global_batch_size=4,
            weight=lambda batch: batch[1].sum(),
            micro_batch_size=self.micro_batch_size,
        )
        for _ in loader.epochs(2):
            for a, n in loader:
                optimizer.zero_grad()
                (model(a)[:, 0].square() * n).sum().div(n.sum()).backward()
                optimizer.step()
        return {"parameters": flat(model.parameters())}

    def __init__(self, micro_batch_size=None):
        self.micro_batch_size = micro_batch_size


def test_a_worker_or_a_pass_whose_samples_weigh_nothing_adds_nothing(tmp_path):
    one = run(SomeWithoutWeight(2), tmp_path / "one", num_slots=1).parameters
    two = run(SomeWithoutWeight(), tmp_path / "two", num_slots=2, config=with_shares(1, 1)).parameters
    assert torch.isfinite(one).all()
    assert relative_error(two, one) < 1e-12


def test_a_batch_that_weighs_nothing_is_a_skipped_step_that_is_told(tmp_path):
    def train():
        model = het.prepare_model(torch.nn.Linear(3, 1))
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        data = DataLoader(TensorDataset(torch.zeros(8, 3)))
        loader = het.prepare_data_loader(data, global_batch_size=4, weight=lambda batch: 0.0)
        for _ in loader.epochs(1):
            for (x,) in loader:
                optimizer.zero_grad()
                model(x).mean().backward()
                optimizer.step()

    with pytest.raises(NonFiniteGradientError, match=r"2 updates in a row.*weights of the whole batch are 0"):
        alone(train, tmp_path, config=HetConfig(max_skipped_steps=2))
