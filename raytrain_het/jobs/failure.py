"""A failed run in words: the traceback of the training function, without Ray's own."""

from __future__ import annotations

import traceback

from raytrain_het.errors import HetError


def describe(error: BaseException) -> str:
    """A failure in words: the cause first, a line of ours last.

    The text of a ``TrainingFailedError`` begins with the training function's error. The traceback of this process,
    which only waited, is left out. The message of any other error of this package is enough. An error of another
    class is a bug of this package, and shown in full.
    """
    from ray.train import TrainingFailedError  # Late: a refused job file needs no Ray.

    if isinstance(error, TrainingFailedError):
        return f"{str(error).strip()}\n\nraytrain-het: the run failed, the cause is above"
    if isinstance(error, HetError):
        return f"raytrain-het: the run failed: {error}"
    return "".join(traceback.format_exception(error)).rstrip()
