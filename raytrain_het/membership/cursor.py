"""A position in the data: what members agree on, what a record names, what a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a run stands. It moves only when a step commits; it heals and is checkpointed with the model."""

    epoch: int = 0
    """The epoch under way, from 0."""

    offset: int = 0
    """How many entries of the epoch's permutation are used up: where the next global batch begins."""

    step: int = 0
    """Steps committed since the run began, over all epochs: the number of the next step."""

    def to_dict(self) -> dict[str, int]:
        """The fields as plain whole numbers, for a checkpoint."""
        return {"epoch": self.epoch, "offset": self.offset, "step": self.step}

    @classmethod
    def from_dict(cls, fields: Mapping[str, int]) -> Cursor:
        """The cursor that `to_dict` described.

        Raises:
            KeyError: a field is missing.
        """
        return cls(epoch=int(fields["epoch"]), offset=int(fields["offset"]), step=int(fields["step"]))
