"""What a worker's error means for the run, and what ``fit`` raises for it."""

from __future__ import annotations

import enum

from ray.train import TrainingFailedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from raytrain_het.errors import EvictedError, HetError, RunFailedError


class TrainFunctionError(HetError, WorkerGroupError):
    """The training function raised. The text begins with its traceback.

    Attributes:
        worker_failures: The exceptions themselves, by world rank.
    """

    def __init__(self, error_message: str, worker_failures: dict[int, Exception]) -> None:
        WorkerGroupError.__init__(self, error_message, worker_failures)

    def __str__(self) -> str:
        ranks = ", ".join(str(rank) for rank in sorted(self.worker_failures))
        return f"{self._error_message.rstrip()}\n(raised by the training function on world rank {ranks})"


class ErrorMeaning(enum.Enum):
    """What an error of a worker's training function means for the run."""

    LEFT = "left"
    """The worker was dropped; the run goes on without it."""
    RUN_FAILED = "run failed"
    """The worker only reports that the run has failed; another error has the reason."""
    USER = "user"
    """The training function itself raised."""


def meaning_of(error: Exception) -> ErrorMeaning:
    """What an error in a worker's status means."""
    cause = error._base_exc if isinstance(error, UserExceptionWithTraceback) else error
    if isinstance(cause, EvictedError):
        return ErrorMeaning.LEFT
    if isinstance(cause, RunFailedError):
        return ErrorMeaning.RUN_FAILED
    return ErrorMeaning.USER


def foremost(errors: dict[int, Exception]) -> dict[int, Exception]:
    """The errors to show: the training function's own, or all errors if there are none of its own."""
    users = {slot: e for slot, e in errors.items() if meaning_of(e) is ErrorMeaning.USER}
    return users or errors


def to_raise(error: TrainingFailedError, texts: dict[int, str]) -> BaseException:
    """The exception that ``fit`` raises for Ray's.

    Args:
        error: The error in Ray's ``Result``.
        texts: The full tracebacks, by world rank.
    """
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, HetError):
        return error.controller_failure
    if isinstance(error, WorkerGroupError) and not isinstance(error, TrainFunctionError):
        failures = error.worker_failures
        if failures and all(isinstance(e, RunFailedError) for e in failures.values()):
            return next(iter(failures.values()))
        different = dict.fromkeys(texts[rank] for rank in sorted(failures) if rank in texts)
        return TrainFunctionError("\n".join(different) or error._error_message, failures)
    return error
