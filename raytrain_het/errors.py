"""The exceptions users can meet. All survive pickling, since Ray carries them between processes."""

from __future__ import annotations


class HetError(Exception):
    """Base of every error raised by raytrain_het itself."""


class ConfigError(HetError, ValueError):
    """A setting is wrong. The message names the field, the value, what is allowed and the fix."""


class ResourceError(HetError, ValueError):
    """A worker spec asks for what no node of the cluster has."""


class LoopOrderError(HetError, RuntimeError):
    """The training loop calls things in an order that a step cannot follow."""


class NotSupportedError(LoopOrderError, ConfigError):
    """The program uses something unsupported. The message is a row of docs/training.md's table, with a way out."""


class NonFiniteGradientError(HetError, ArithmeticError):
    """Gradients were NaN or infinite for too many steps in a row."""


class ReplicaMismatchError(HetError, RuntimeError):
    """Two workers built different models, or a checkpoint belongs to another model."""


class CheckpointError(HetError, RuntimeError):
    """A checkpoint could not be written or read."""


class DataProcessError(HetError, RuntimeError):
    """A process that fetches samples for a worker died."""


class HubError(HetError, RuntimeError):
    """The membership actor cannot start."""


class EvictedError(HetError, RuntimeError):
    """This worker was dropped from the run, and its peers go on without it."""


class ProtocolError(HetError, RuntimeError):
    """A peer sent a message that the protocol does not allow. The step fails, and nothing of it is applied."""


class ForeignError(HetError, RuntimeError):
    """Replaces an exception of the training function that cannot be pickled. Its text begins with that one's class."""


class RunFailedError(HetError, RuntimeError):
    """The run cannot go on. The membership actor has ended it, for the reason that the message gives.

    Args:
        message: The reason.
        poison: Where workers died again and again: the step and the slots, with their ranks and shares in
            their last generation.
    """

    def __init__(self, message: str, poison: dict | None = None) -> None:
        super().__init__(message, poison)
        self.poison = poison

    def __str__(self) -> str:
        return str(self.args[0])
