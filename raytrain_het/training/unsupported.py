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
