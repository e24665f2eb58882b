"""What to show of a run that failed: the traceback of the training function first, not Ray's noise."""

from __future__ import annotations

from collections.abc import Mapping

from ray.train import TrainingFailedError


def describe(error: BaseException) -> str | None:
    """The failure in words, or ``None`` if its own traceback says it best.

    Ray Train wraps what a worker raised in an error that holds one failure per world rank; all
    ranks usually fail alike, so the first is shown in full and the others are counted.
    """
    failures = getattr(error, "worker_failures", None)
    if isinstance(error, TrainingFailedError) and not failures:
        return str(error)
    if not isinstance(failures, Mapping) or not failures:
        return None
    rank = min(failures)
    others = f" (and on {len(failures) - 1} more)" if len(failures) > 1 else ""
    return f"{str(failures[rank]).strip()}\n\nraytrain-het: the training function failed on worker {rank}{others}"
