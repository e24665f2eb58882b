"""What to show of a run that failed: the traceback of the training function first, not Ray's noise."""

from __future__ import annotations

import traceback

from raytrain_het.errors import HetError


def describe(error: BaseException) -> str:
    """The failure in words, with the cause first and our own line last.

    The text of a ``TrainingFailedError`` begins with what the training function raised; the
    traceback of this process, which only waited, would bury it. Other errors of this package say
    in their message what is wrong. Anything else is a mistake of ours and shown in full.
    """
    from ray.train import TrainingFailedError  # Late: a refused job file needs no Ray.

    if isinstance(error, TrainingFailedError):
        return f"{str(error).strip()}\n\nraytrain-het: the run failed, the cause is above"
    if isinstance(error, HetError):
        return f"raytrain-het: the run failed: {error}"
    return "".join(traceback.format_exception(error)).rstrip()
