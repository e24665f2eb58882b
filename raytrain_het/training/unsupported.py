"""What a program may not do here: one table, with a sentence and a way out for each.

Everything else trains as one process with the whole batch would. :func:`refuse` makes the error; nothing here detects
anything. docs/training.md shows the same rows, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.errors import LoopOrderError


@dataclass(frozen=True, kw_only=True)
class Unsupported:
    """One row: ``what`` is a sentence that is true of the program, ``way_out`` is something to type."""

    what: str
    way_out: str


TABLE: dict[str, Unsupported] = {
    "second model": Unsupported(
        what="prepare_model() was called twice: one model per run",
        way_out="Wrap several in one nn.Module",
    ),
    "second optimizer": Unsupported(
        what="prepare_optimizer() was called twice: one optimizer per run",
        way_out="Give one optimizer all parameters, in several parameter groups",
    ),
    "second loader": Unsupported(
        what="prepare_data_loader() was called twice: one training loader per run",
        way_out="For held-out data use raytrain_het.evaluate(fn, dataset)",
    ),
    "closure": Unsupported(
        what="optimizer.step(closure) evaluates the loss several times a step",
        way_out="Call backward() yourself, then step()",
    ),
    "own loop": Unsupported(
        what="the training function has come to its end, and nothing was trained together",
        way_out=(
            "Write for epoch in loader.epochs(n): and in it for x, y in loader:, with model, optimizer and loader from "
            "raytrain_het.prepare_model, prepare_optimizer and prepare_data_loader, and zero_grad(), backward(), "
            "step() once for each batch"
        ),
    ),
    "DistributedDataParallel": Unsupported(
        what=(
            "torch's DistributedDataParallel is made inside HetTrainer, where torch's process group has one member: it "
            "would average nothing"
        ),
        way_out="Write model = raytrain_het.prepare_model(model) instead, which averages gradients over all workers",
    ),
    "FullyShardedDataParallel": Unsupported(
        what=(
            "torch's FullyShardedDataParallel is made inside HetTrainer, where torch's process group has one member: "
            "every worker would train by itself"
        ),
        way_out=(
            "Write model = raytrain_het.prepare_model(model) instead; every worker holds the whole model, so one that "
            "does not fit needs smaller parameters (bfloat16) or fewer of them"
        ),
    ),
    "DeviceMesh": Unsupported(
        what=(
            "a DeviceMesh is made inside HetTrainer (by fully_shard, by tensor parallelism or by hand), where torch's "
            "process group has one member: every worker would train by itself"
        ),
        way_out=(
            "Leave fully_shard and parallelize_module out, and write model = raytrain_het.prepare_model(model); every "
            "worker holds the whole model"
        ),
    ),
    "DistributedSampler": Unsupported(
        what=(
            "a DistributedSampler is made inside HetTrainer: it gives each worker an equal part of the data for good, "
            "and here shares differ and workers come and go"
        ),
        way_out=(
            "Write loader = raytrain_het.prepare_data_loader(DataLoader(dataset, shuffle=True), "
            "global_batch_size=512), and for held-out data raytrain_het.evaluate(fn, dataset)"
        ),
    ),
    "SyncBatchNorm": Unsupported(
        what=(
            "a SyncBatchNorm is made inside HetTrainer, where torch's process group has one member: it would see one "
            "worker's samples only"
        ),
        way_out=(
            "Use torch.nn.BatchNorm1d/2d/3d, whose running statistics are averaged over all workers at every step, or "
            "torch.nn.GroupNorm, which does not depend on the batch"
        ),
    ),
    "torch collective": Unsupported(
        what=(
            "a collective of torch.distributed is called inside HetTrainer on the default process group, which has one "
            "member here: it would give back this worker's own values"
        ),
        way_out=(
            "For means and sums over workers use raytrain_het.report(metrics, reduce={...}) or "
            "raytrain_het.evaluate(fn, dataset); gradients are averaged by prepare_model; no barrier is needed"
        ),
    ),
    "ray.train.torch.prepare_model": Unsupported(
        what="ray.train.torch.prepare_model() wraps the model for equal workers that never change",
        way_out="Write model = raytrain_het.prepare_model(model) instead, which moves it to the worker's device too",
    ),
    "ray.train.torch.prepare_data_loader": Unsupported(
        what="ray.train.torch.prepare_data_loader() gives each worker an equal part of the data for good",
        way_out=(
            "Write loader = raytrain_het.prepare_data_loader(DataLoader(dataset, shuffle=True), global_batch_size=512)"
        ),
    ),
    "ray.train.report": Unsupported(
        what="ray.train.report() waits for every rank, and here workers come and go: it would stop the run",
        way_out=(
            "Write raytrain_het.report(metrics), which saves a checkpoint of model, optimizer and registered state too"
        ),
    ),
    "ray.train.get_checkpoint": Unsupported(
        what="ray.train.get_checkpoint() has nothing to give here, also in a run that goes on from a checkpoint",
        way_out=(
            "Leave it out: loader.epochs() brings model, optimizer and position back. For what else is to come back, "
            "call raytrain_het.register_state(name, obj)"
        ),
    ),
    "ray.train.collective.barrier": Unsupported(
        what="ray.train.collective.barrier() waits for every rank, and here workers come and go: it would stop the run",
        way_out="Leave it out: steps and reports keep workers together",
    ),
    "ray.train.collective.broadcast_from_rank_zero": Unsupported(
        what=(
            "ray.train.collective.broadcast_from_rank_zero() waits for every rank, and here workers come and go: it "
            "would stop the run"
        ),
        way_out="Compute it on every worker, or write raytrain_het.register_state(name, obj) for state that changes",
    ),
    "ray.train.get_preemption_info": Unsupported(
        what="ray.train.get_preemption_info() waits for every rank, and here workers come and go",
        way_out="Leave it out: a lost worker does not end the run",
    ),
}


def refuse(row: str, detail: str = "") -> LoopOrderError:
    """The error for one row of the table.

    Args:
        row: its key.
        detail: what is known of this program besides: a name, a value.

    Returns:
        The error, to be raised.

    Example:
        >>> str(refuse("closure"))
        'optimizer.step(closure) evaluates the loss several times a step. Call backward() yourself, then step().'
    """
    entry = TABLE[row]
    return LoopOrderError(f"{entry.what}{': ' * bool(detail)}{detail}. {entry.way_out}.")
