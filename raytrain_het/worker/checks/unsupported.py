"""What a program may not do here: one table, with a sentence and a way out for each.

Everything else trains as one process with the whole batch would. :func:`refuse` makes the error; nothing here detects
anything. docs/training.md shows the same rows, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.errors import NotSupportedError


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
    "second backward": Unsupported(
        what="backward() ran twice for one batch",
        way_out="Add the losses up and call it once; to accumulate gradients, give prepare_data_loader a "
        "micro_batch_size",
    ),
    "skipped batch": Unsupported(
        what="backward() has raised, and the loop went on to the next batch",
        way_out="Let the error end the run; if memory runs out, give prepare_data_loader a micro_batch_size",
    ),
    "create_graph": Unsupported(
        what="backward(create_graph=True): the means of all workers have no graph",
        way_out="For a penalty on gradients take torch.autograd.grad(..., create_graph=True) and add it to the loss",
    ),
    "backward from elsewhere": Unsupported(
        what="a backward pass of the prepared model was begun by an extension or in another thread",
        way_out="Call loss.backward() in Python, in the thread that runs the training function",
    ),
    "gradient in parts": Unsupported(
        what="a parameter's gradient came in parts, by a backward pass inside of the backward pass, for the first "
        "time in the middle of the run",
        way_out="Write checkpoint(..., use_reentrant=False), or do it so from the first step on",
    ),
    "sparse gradient": Unsupported(
        what="sparse gradients can't be averaged",
        way_out="Build the embedding with sparse=False",
    ),
    "embedding with max_norm": Unsupported(
        what="Embedding(max_norm=...) changes the rows that a pass looks up, and each worker looks up others",
        way_out="Leave max_norm out, and after optimizer.step() write, under torch.no_grad(): "
        "embedding.weight.renorm_(2, 0, max_norm)",
    ),
    "weights changed in a failed step": Unsupported(
        what="a peer was lost, the step has to be done again, and the loop's body has changed parameters by hand "
        "before optimizer.step()",
        way_out="Change parameters right after optimizer.step(); then the change belongs to a step that is done",
    ),
    "sparse parameter": Unsupported(
        what="sparse parameters can't be trained",
        way_out="Make it dense: p.to_dense()",
    ),
    "complex parameter": Unsupported(
        what="only real floating point can be trained",
        way_out="Keep the parameter as torch.view_as_real(p), and take view_as_complex of it in forward()",
    ),
    "scripted module": Unsupported(
        what="modules of torch.jit.script and torch.jit.trace can't be prepared",
        way_out="Prepare the module that it was made of; script it after training",
    ),
    "lazy parameter": Unsupported(
        what="the model has lazy modules, whose parameters have no shape before the first pass",
        way_out="Pass one batch through the model before prepare_model()",
    ),
    "parameter of another class": Unsupported(
        what="parameters are plain tensors here; those of FSDP2, tensor parallelism and subclasses are none",
        way_out="Prepare the plain model: het.prepare_model() does the averaging",
    ),
    "parameters outside": Unsupported(
        what="the optimizer has parameters that the prepared model has not, so they would be trained by each worker "
        "for itself",
        way_out="Make what they belong to a part of the model before prepare_model(model), for example model.loss = "
        "loss",
    ),
    "loss that is no mean": Unsupported(
        what="the loss is neither a mean nor a sum over samples, so workers' gradients do not make that of the "
        "whole batch",
        way_out="Take the function of each sample first and the mean last; or write prepare_data_loader(..., "
        "loss='local'): then each pass has a loss of its own samples, and gradients are averaged by samples",
    ),
    "samples that see each other": Unsupported(
        what="the loss or the model computes something of the samples of a pass together, and a worker has its own "
        "only, so workers' gradients do not make that of the whole batch",
        way_out="Compute it of each sample by itself; if it counts what the loss is a mean over, write "
        "prepare_data_loader(..., weight=lambda batch: ...); or write loss='local': then each pass computes it of its "
        "own samples, and gradients are averaged by samples, as torch's DDP does",
    ),
    "LBFGS": Unsupported(
        what="torch.optim.LBFGS evaluates the loss several times a step",
        way_out="Take an optimizer that needs one gradient a step, such as SGD or Adam",
    ),
    "other optimizer": Unsupported(
        what="an optimizer that was not prepared has taken a step in the loop's body: what it trains would differ "
        "between workers",
        way_out="Give all parameters to the prepared optimizer, in several parameter groups",
    ),
    "added group": Unsupported(
        what="the optimizer's parameter groups have changed after loader.epochs(), and a worker that joins later "
        "would not have the new ones",
        way_out="Give it all groups at the beginning; before optimizer.step() set p.grad = None for those that are "
        "to rest",
    ),
    "unfrozen parameter": Unsupported(
        what="a parameter is trained that was frozen when the run began, and nobody averages its gradients",
        way_out="Leave requires_grad=True from the beginning, and set p.grad = None before optimizer.step() as long "
        "as it is to stay as it is",
    ),
    "changed model": Unsupported(
        what="the model's modules or parameters are others than those that the run began with",
        way_out="Build the whole model before prepare_model(); for another one, start a new run: RunConfig(name=...)",
    ),
    "changing buffer": Unsupported(
        what="a buffer keeps its shape and dtype, is never None at one time and a tensor at another, and if it is "
        "sparse or quantized it stays as it is",
        way_out="Give it its final shape in __init__, or keep it as a plain attribute outside of the buffers",
    ),
    "stream": Unsupported(
        what="an IterableDataset is a stream, and samples are dealt out by index",
        way_out="Give it __len__ and __getitem__, or read it into a list first: DataLoader(list(dataset), ...)",
    ),
    "loader without batches": Unsupported(
        what="DataLoader(batch_size=None) makes no batches",
        way_out="Write DataLoader(dataset, batch_size=32)",
    ),
    "loader that iterates in its own way": Unsupported(
        what="the loader is of a subclass of DataLoader that iterates in its own way",
        way_out="Give a plain torch.utils.data.DataLoader, with the order in a sampler and the batches in a collate_fn",
    ),
    "sampler of a part": Unsupported(
        what="the sampler deals out parts of the data to workers (DistributedSampler), and here nobody owns a part",
        way_out="Write DataLoader(dataset, shuffle=True)",
    ),
    "sampler that changes by itself": Unsupported(
        what="the sampler depends on how often it was iterated, and not on the epoch alone",
        way_out=(
            "Give it a method set_epoch(self, epoch), which the loader calls, and let the order follow from that; or "
            "draw with torch.rand, numpy.random or random, which are seeded for every epoch"
        ),
    ),
    "sampler told another epoch": Unsupported(
        what="set_epoch() was called with another number than the epoch's",
        way_out="Leave the call out: the loader calls set_epoch(epoch) with the epochs of loader.epochs()",
    ),
    "sampler without end": Unsupported(
        what="the sampler does not end",
        way_out="Let it end after the indices of one epoch",
    ),
    "second pass": Unsupported(
        what="a loop over the loader was begun in an epoch that is over",
        way_out=(
            "Write one loop over the loader in each round of for epoch in loader.epochs(n). For a score of the "
            "training data use raytrain_het.evaluate(fn, loader)"
        ),
    ),
    "pass begun again": Unsupported(
        what="a loop over the loader was left in the middle of its epoch, and another begun",
        way_out=(
            "Run one loop to its end, or keep its iterator: batches = iter(loader). To look at a batch, take it from "
            "the DataLoader that you gave to prepare_data_loader(), before it"
        ),
    ),
    "dataset of another length": Unsupported(
        what="the dataset's length changed",
        way_out=(
            "Keep its length, and give a sampler whose set_epoch(epoch) chooses the indices of each epoch: "
            "DataLoader(dataset, sampler=...)"
        ),
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


def refuse(row: str, detail: str = "") -> NotSupportedError:
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
    return NotSupportedError(f"{entry.what}{': ' * bool(detail)}{detail}. {entry.way_out}.")
