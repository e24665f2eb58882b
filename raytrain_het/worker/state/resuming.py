"""What a checkpoint gives back to a worker, and what it is compared with first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.errors import CheckpointError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.worker.data.data_plan import DataPlan
from raytrain_het.worker.state import checkpoint as files
from raytrain_het.worker.state.extras import Extras
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.step.rate_in_force import asked_for, told_of
from raytrain_het.worker.step.rates import give_back


@dataclass
class Resuming:
    """Loads checkpoints into one worker's replica."""

    storage: files.Storage
    slot: int
    num_slots: int
    plan: DataPlan
    parameters: dict[str, list[int]]
    """By name: the shape."""
    data: dict[str, Any]
    """What a checkpoint's cursor belongs to."""
    replica: Replica
    codec_states: ErrorFeedback
    extras: Extras = field(default_factory=Extras)
    scheduled: bool = False
    """Whether the run sets the learning rate."""
    tell: Callable[[str], None] = lambda text: None
    """What the run's log is to say."""
    resumed: bool = False
    """Whether this worker has gone on from a checkpoint before: only the first differs from what the program says."""

    def load(self, path: str, cursor: Cursor) -> Cursor:
        """Load a checkpoint; returns where its cursor stands under this run's batch size, the same on all workers.

        Raises:
            CheckpointError: it is of another model, optimizer or data set, or cannot be read.
        """
        with self.storage.fetch(path, files.wanted(self.slot, self.num_slots)) as directory:
            meta = files.read_meta(directory)
            files.check_same_model(meta, self.parameters, path)
            files.check_same_data(meta, self.data, path)
            try:
                self._load(directory)
            except CheckpointError as error:
                raise CheckpointError(f"checkpoint {path}: {error}") from error.__cause__
            except (RuntimeError, ValueError, KeyError) as error:
                raise CheckpointError(f"checkpoint {path} does not fit this optimizer or model: {error}") from error
        return self.plan.resumed(cursor)

    def _load(self, directory: str) -> None:
        state, own = files.read_state(directory), files.read_worker(directory, self.slot) or {}
        left_over = files.read_left_over(directory, self.slot, self.num_slots)
        optimizer = self.replica.optimizer
        asked = asked_for(optimizer) if optimizer is not None and not self.resumed else []
        self.replica.load(state)
        if not self.scheduled and optimizer is not None:
            give_back(optimizer)
        if optimizer is not None and (kept := told_of(asked, optimizer)) is not None:
            self.tell(kept)
        self.resumed = True
        self.codec_states.load(own.get("codec", {}))
        for other in left_over:
            self.codec_states.adopt(other["codec"])
        self.codec_states.weight_per_sample = own.get("weight_per_sample")
        self.extras.load(state["extras"] | own.get("extras", {}))
