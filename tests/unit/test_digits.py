"""The digits job: its data, its model, and that it learns (alone, without the step protocol)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import raytrain_het as het
from raytrain_het.jobs.digits import training as digits
from raytrain_het.jobs.digits.job import NUM_SAMPLES
from raytrain_het.jobs.table import load_job


class PlainLoader:
    """All of the batch on one worker."""

    def __init__(self, loader: DataLoader[Any], *, global_batch_size: int) -> None:
        self.loader = DataLoader(loader.dataset, batch_size=global_batch_size, shuffle=True)

    def epochs(self, num_epochs: int) -> range:
        return range(num_epochs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def plain_evaluate(fn: Callable[[Any], dict[str, Any]], dataset: Any) -> dict[str, float]:
    (batch,) = DataLoader(dataset, batch_size=len(dataset))
    return {name: float(value) / len(dataset) for name, value in fn(batch).items()}


def test_the_split_is_stratified_disjoint_and_fixed_by_the_seed() -> None:
    train, test = digits.digits_split(0)
    assert (len(train), len(test)) == (NUM_SAMPLES, 360) == (1437, 360)
    counts = torch.bincount(test.labels)
    assert counts.min() >= 34
    assert torch.equal(test.images, digits.digits_split(0)[1].images)
    assert not torch.equal(test.labels, digits.digits_split(1)[1].labels)


def test_only_training_images_are_shifted_and_all_keep_their_shape() -> None:
    train, test = digits.digits_split(0)
    torch.manual_seed(0)
    seen = {tuple(train[3][0].flatten().tolist()) for _ in range(50)}
    assert 2 <= len(seen) <= 9
    assert train[3][0].shape == test[3][0].shape == (1, 8, 8)
    assert torch.equal(test[3][0], test[3][0])


def test_the_model_is_free_of_batch_norm_and_dropout() -> None:
    model = digits.build_model()
    assert sum(p.numel() for p in model.parameters()) == 151_306
    assert not [m for m in model.modules() if "Norm" in type(m).__name__ or "Dropout" in type(m).__name__]


def test_a_few_epochs_on_one_worker_learn_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[dict[str, float]] = []
    monkeypatch.setattr(het, "prepare_model", lambda model: model, raising=False)
    monkeypatch.setattr(het, "prepare_optimizer", lambda optimizer: optimizer, raising=False)
    monkeypatch.setattr(het, "prepare_data_loader", PlainLoader, raising=False)
    monkeypatch.setattr(het, "evaluate", plain_evaluate, raising=False)
    monkeypatch.setattr(het, "report", reports.append, raising=False)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    digits.train_digits(load_job(None, ["epochs=8"]).train_loop_config())
    assert len(reports) == 8
    assert set(reports[-1]) == {"train_loss", "accuracy", "held_out_loss"}
    assert reports[-1]["accuracy"] > 0.93
