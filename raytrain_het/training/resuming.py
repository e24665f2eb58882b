"""What a checkpoint gives back to a worker, and what it is compared with first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raytrain_het.collectives.codec_states import CodecStates
from raytrain_het.errors import CheckpointError
from raytrain_het.training import checkpoint as files
from raytrain_het.training.cursor import Cursor, DataPlan
from raytrain_het.training.rate_in_force import asked_for, told_of
from raytrain_het.training.rates import give_back
from raytrain_het.training.replica import Replica


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
    codec_states: CodecStates
    scheduled: bool = False
    """Whether the run sets the learning rate."""
    tell: Callable[[str], None] = lambda text: None
    """What the run's log is to say."""
    resumed: bool = False
    """Whether this worker's random states are its own by now: only the first checkpoint of its life sets them."""

    def load(self, path: str, cursor: dict[str, int]) -> dict[str, int]:
        """Load a checkpoint; returns where its cursor stands under this run's batch size, the same on all workers.

        Raises:
            CheckpointError: it is of another model, optimizer or data set, or cannot be read.
        """
        with self.storage.fetch(path) as directory:
            meta = files.read_meta(directory)
            files.check_same_model(meta, self.parameters, path)
            files.check_same_data(meta, self.data, path)
            own = files.read_worker(directory, self.slot)
            try:
                optimizer = self.replica.optimizer
                asked = asked_for(optimizer) if optimizer is not None and not self.resumed else []
                self.replica.load(files.read_state(directory))
                if not self.scheduled and optimizer is not None:
                    give_back(optimizer)
                if optimizer is not None and (kept := told_of(asked, optimizer)) is not None:
                    self.tell(kept)
                self.codec_states.load(own["codec"] if own is not None else {})
                for other in files.read_left_over(directory, self.slot, self.num_slots):
                    self.codec_states.adopt(other["codec"])
                self.codec_states.weight_per_sample = own.get("weight_per_sample") if own is not None else None
            except CheckpointError as error:
                raise CheckpointError(f"checkpoint {path}: {error}") from None
            except (RuntimeError, ValueError, KeyError) as error:
                raise CheckpointError(f"checkpoint {path} does not fit this optimizer or model: {error}") from error
            if own is not None and not self.resumed:
                files.set_random_states(own["random"])
        self.resumed = True
        return self.plan.resumed(Cursor.from_dict(cursor)).to_dict()
