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
