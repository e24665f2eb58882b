"""What users call inside the training function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from raytrain_het.training.data_loader import HetDataLoader, dataset_size, to_device
from raytrain_het.training.fetch import SampleFetcher
from raytrain_het.training.metrics import check_sums
from raytrain_het.training.optimizer import make_het
from raytrain_het.training.session import current

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741
M = TypeVar("M", bound=nn.Module)


def prepare_model(model: M) -> M:
    """Move the model to this worker's device and put gradient hooks on its parameters.

    Returns:
        The same object, not a wrapper: ``state_dict`` keys, attributes and methods stay as they were. After the last
        ``backward()`` of a step every ``p.grad`` is the weighted mean over all workers, as with DDP.

    Raises:
        ConfigError: it has no trainable parameters, or parameters of a kind that cannot travel.
        LoopOrderError: called twice, or outside of a training function.
    """
    session = current()
    model = model.to(session.device)
    session.set_model(model)
    return model


def prepare_optimizer(optimizer: O) -> O:
    """Let ``optimizer.step()`` close the step: it updates and commits, or does nothing if the step is done again.

    Returns:
        The same object, of a subclass of its class; learning-rate schedulers made from it afterwards work.

    Raises:
        LoopOrderError: a scheduler was attached before, or called twice, or outside of a training function.
    """
    session = current()
    session.set_optimizer(optimizer, make_het(optimizer, session))
    return optimizer


def prepare_data_loader(
    loader: DataLoader,
    *,
    global_batch_size: int | None = None,
    micro_batch_size: int | None = None,
    weight: Callable[[Any], float] | None = None,
) -> HetDataLoader:
    """A loader that yields this worker's share of each global batch.

    The loader's dataset, collate function, number of data processes, ``drop_last`` and whether it shuffles are taken
    over; nobody owns a part of the data, and every sample of an epoch is used exactly once, whoever comes or goes.

    Args:
        loader: a map-style ``DataLoader``.
        global_batch_size: B, samples per step over all workers; by default the loader's ``batch_size``.
        micro_batch_size: most samples in one forward pass; a larger share comes in several, summed exactly.
        weight: the weight of a batch, where samples are the wrong measure (the number of tokens, say): a finite number
            from 0. The loss must be the mean over what it counts.

    Raises:
        ConfigError: the dataset has no length, or the batch is smaller than the number of workers.
    """
    return HetDataLoader(
        current(), loader, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, weight=weight
    )


def register_state(name: str, obj: Any) -> None:
    """Let an object's state heal, be checkpointed, and move on commit only (schedulers, scalers, your own).

    Its ``state_dict()`` is copied at every step's opening and restored if the step is done again: keep it small. A
    checkpoint's tensors come back on the CPU, as with ``torch.load(map_location="cpu")``.

    Raises:
        ConfigError: it has no ``state_dict``/``load_state_dict``, or the name is taken.
        LoopOrderError: called after ``loader.epochs()``, or outside of a training function.
    """
    current().register_state(name, obj)


def num_participants() -> int:
    """Workers that take part in the steps now. ``get_world_size()`` counts slots, vacant ones included."""
    return current().num_participants()


def report(metrics: dict[str, Any], *, reduce: dict[str, str] | None = None, checkpoint: bool = True) -> None:
    """Report metrics and save a checkpoint, keyed by step.

    Returns at once, unless two earlier checkpoints are still being stored; repeated until acknowledged.

    Every worker calls it at the same place: a run in which only some do fails, and says who. Metrics are averaged over
    workers, weighted by the samples each has trained on since its last report.

    Args:
        metrics: numbers, texts, flags or one-element tensors by name, or dictionaries of these, whose names are joined
            by ``/``.
        reduce: other reductions by name: "mean", "sum", "max" or "min".
        checkpoint: whether to save model, optimizer, registered state and cursor with it.

    Raises:
        ConfigError: a metric of another kind.
        LoopOrderError: called before ``loader.epochs()``.
    """
    current().report(metrics, reduce=reduce, checkpoint=checkpoint)


def evaluate(
    fn: Callable[[Any], dict[str, float | torch.Tensor]],
    dataset: Dataset,
    *,
    batch_size: int = 256,
    name: str = "evaluate",
) -> dict[str, float]:
    """Exact means over a held-out dataset, computed by all workers together.

    Chunks of the dataset are handed out to whoever is free, so that a fast worker does more of them, and again if a
    worker dies.

    Args:
        fn: takes a batch on this worker's device, returns for each metric its *sum* over the batch's samples, the same
            names for every batch. Runs under ``torch.no_grad()`` with the model in evaluation mode.
        dataset: map-style, with a length.
        batch_size: samples per chunk.
        name: tells evaluations at the same step apart.

    Returns:
        ``sum / len(dataset)`` for each metric, the same to the bit on every worker that calls it at the same line.

    Raises:
        ConfigError: ``fn`` returned something that is no number, or other names for another batch.
        Exception: what ``fn`` or the dataset raised, on whichever worker: all that take part raise it.
    """
    session = current()
    size = dataset_size(dataset)
    fetcher = SampleFetcher(dataset, None, num_workers=0, seed=session.config.seed)
    model = session.replica.model
    assert model is not None
    training = model.training

    def run_chunk(chunk: int) -> dict[str, float]:
        indices: Sequence[int] = range(chunk * batch_size, min(size, (chunk + 1) * batch_size))
        batch = to_device(fetcher.fetch(0, indices), session.device)
        return check_sums(fn(batch))

    try:
        model.eval()
        with torch.no_grad():
            sums = session.evaluate(-(-size // batch_size), run_chunk, name)
    finally:
        model.train(training)
        fetcher.close()
    return {name: value / size for name, value in sums.items()}
