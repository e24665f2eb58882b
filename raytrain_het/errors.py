"""The exceptions users can meet. All survive pickling, since Ray carries them between processes."""

from __future__ import annotations


class HetError(Exception):
    """Base of every error raised by raytrain_het itself."""


class ConfigError(HetError, ValueError):
    """A setting is wrong. The message names the field, the value, what is allowed and the fix."""


class ResourceError(HetError, ValueError):
    """A worker spec asks for what no node of the cluster has."""


class LoopOrderError(HetError, RuntimeError):
    """The training loop was used in an order that the step does not know."""


class NotSupportedError(LoopOrderError, ConfigError):
    """The program does what is not supported: one row of docs/training.md's table, with a way out."""


class NonFiniteGradientError(HetError, ArithmeticError):
    """Gradients were NaN or infinite for too many steps in a row."""


class ReplicaMismatchError(HetError, RuntimeError):
    """Two workers built different models, or a checkpoint belongs to another model."""


class CheckpointError(HetError, RuntimeError):
    """A checkpoint could not be written or read."""


class DataProcessError(HetError, RuntimeError):
    """A process that fetches samples for a worker died."""


class EvictedError(HetError, RuntimeError):
    """This worker was dropped from the run: its peers had to go on without it."""


class ProtocolError(HetError, RuntimeError):
    """A peer sent what the protocol does not allow; the step fails, nothing is applied."""


class ForeignError(HetError, RuntimeError):
    """Stands for an exception of the training function that cannot be sent to another process as it is.

    Its text begins with the class of that one.
    """


class RunFailedError(HetError, RuntimeError):
    """The run cannot go on: the membership actor ended it, with the reason.

    Args:
        message: The reason.
        poison: Where workers died again and again: step, slots, and their ranks and the shares
            of their last generation.
    """

    def __init__(self, message: str, poison: dict | None = None) -> None:
        super().__init__(message, poison)
        self.poison = poison

    def __str__(self) -> str:
        return str(self.args[0])
