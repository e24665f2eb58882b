"""What users call inside the training function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from raytrain_het.worker.data.data_loader import HetDataLoader
from raytrain_het.worker.data.forked_generators import seed_of, seeded
from raytrain_het.worker.data.held_out import HeldOut, evaluation_mode
from raytrain_het.worker.session import current
from raytrain_het.worker.state.evaluations import describe
from raytrain_het.worker.state.metrics import check_sums
from raytrain_het.worker.step.optimizer import make_het

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
    session.draft.set_model(model)
    return model


def prepare_optimizer(optimizer: O) -> O:
    """Let ``optimizer.step()`` close the step: it updates and commits, or does nothing if the step is done again.

    Returns:
        The same object, of a subclass of its class; learning-rate schedulers made from it afterwards work.

    Raises:
        LoopOrderError: a scheduler is attached to it already, or this is the second call, or no training function runs.
    """
    session = current()
    session.draft.set_optimizer(optimizer, make_het(optimizer, session))
    return optimizer


def prepare_data_loader(
    loader: DataLoader,
    *,
    global_batch_size: int | None = None,
    micro_batch_size: int | None = None,
    weight: Callable[[Any], float] | None = None,
    loss: Literal["mean", "sum", "local"] = "mean",
) -> HetDataLoader:
    """A loader that yields this worker's share of each global batch.

    Nobody owns a part of the data: with plain ``shuffle=True`` or ``False`` every sample of an epoch is used exactly
    once, whoever comes or goes. Any sampler that is a function of the epoch is followed, with its repeated indices; a
    ``batch_sampler`` gives the global batches. Collate function, data processes and their settings, ``drop_last`` and
    ``generator`` are the loader's; docs/training.md has them one by one.

    Args:
        loader: a map-style ``DataLoader``.
        global_batch_size: B, samples per step over all workers; by default the loader's ``batch_size``. With a
            ``batch_sampler`` it is left out.
        micro_batch_size: most samples in one forward pass; a larger share comes in several, summed exactly.
        weight: the weight of a batch, where samples are the wrong measure (the number of tokens, say): a finite number
            from 0. The loss must be the mean over what it counts.
        loss: what the loss is of the batch that the loop gets. ``mean`` over its samples, or over what ``weight``
            counts; ``sum`` over its samples, penalties on parameters left out, which would count once a worker;
            ``local``, any function of its own samples, whose gradients are averaged by samples as DDP would. Where it
            turns out to be another one, ``backward()`` raises.

    Raises:
        ConfigError: the dataset has no length, or the batch is smaller than the number of workers.
        LoopOrderError: a stream, a sampler that is no function of the epoch, or another thing that is not supported.
    """
    return HetDataLoader(
        current(),
        loader,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        weight=weight,
        loss=loss,
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
    worker = current().joined("report()", "there is no step to report on yet.")
    worker.report(metrics, reduce=reduce, checkpoint=checkpoint)


def evaluate(
    fn: Callable[[Any], dict[str, float | torch.Tensor]],
    data: Dataset | DataLoader | HetDataLoader,
    *,
    batch_size: int | None = None,
    name: str = "evaluate",
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> dict[str, float]:
    """Exact means over held-out data, computed by all workers together.

    Chunks of the data are handed out to whoever is free, so that a fast worker does more of them, and again if a
    worker dies. Random numbers that ``fn`` draws are seeded by (seed, step, name, chunk), and the training's generators
    are left as they were: neither depends on who took which chunk.

    Args:
        fn: takes a batch on this worker's device, returns for each metric its *sum* over the batch's samples. Runs
            under ``torch.no_grad()`` with the model in evaluation mode.
        data: a map-style dataset with a length, or a ``DataLoader``, whose batches, sampler, ``collate_fn`` and data
            processes are used; or the prepared training loader.
        batch_size: samples in a chunk, 256 by default. A ``DataLoader`` has its own.
        name: tells evaluations at the same step apart.
        collate_fn: makes a batch of a list of samples; by default the training loader's.

    Returns:
        ``sum / number of samples`` for each metric, the same to the bit on every worker.

    Raises:
        ConfigError: ``fn`` returned something else than one number by name, or other names for another batch; or the
            data do not suit.
        LoopOrderError: called before ``loader.epochs()``; or data that cannot be dealt out by index.
        Exception: what ``fn`` or the dataset raised, on whichever worker: all that take part raise it.
    """
    session = current()
    worker, seed = session.joined("evaluate()", "join the run first."), session.config.seed
    cursor = worker.engine.cursor
    held_out = HeldOut(
        data,
        batch_size=batch_size,
        collate_fn=collate_fn,
        default_collate_fn=worker.prepared.data.collate_fn,
        seed=seed,
        epoch=cursor.epoch,
    )

    def run_chunk(chunk: int) -> dict[str, float]:
        with seeded(seed_of("evaluate", seed, cursor.step, name, chunk), session.device):
            return check_sums(fn(held_out.batch(chunk, session.device)))

    try:
        with evaluation_mode(worker.prepared.model):
            sums = worker.evaluate(held_out.num_chunks, run_chunk, f"{name} ({describe(fn)}, {held_out.key})")
    finally:
        held_out.close()
    return {name: value / held_out.num_samples for name, value in sums.items()}
