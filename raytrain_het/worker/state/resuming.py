"""What a checkpoint gives back to a worker, and what it is compared with first."""

from __future__ import annotations

from collections.abc import Callable

from raytrain_het.errors import CheckpointError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.worker.context import WorkerContext
from raytrain_het.worker.state import checkpoint as files
from raytrain_het.worker.state.contents import Contents
from raytrain_het.worker.step.rate_in_force import asked_for, told_of
from raytrain_het.worker.step.rates import give_back


class Resuming:
    """Loads checkpoints into one worker.

    Args:
        context: this worker's slot, and where checkpoints are.
        contents: what is loaded.
        scheduled: whether the run sets the learning rate.
        tell: what the run's log is to say.
    """

    def __init__(
        self, context: WorkerContext, contents: Contents, *, scheduled: bool, tell: Callable[[str], None]
    ) -> None:
        self._slot, self._storage, self._contents = context.slot, context.storage, contents
        self._scheduled, self._tell = scheduled, tell
        self._resumed = False
        """Whether this worker has gone on from a checkpoint before: only the first differs from what the program
        says."""

    def load(self, path: str, cursor: Cursor) -> Cursor:
        """Load a checkpoint; returns where its cursor stands under this run's batch size, the same on all workers.

        Raises:
            CheckpointError: it is of another model, optimizer or data set, or cannot be read.
        """
        contents = self._contents
        with self._storage.fetch(path, files.wanted(self._slot, contents.num_slots)) as directory:
            meta = files.read_meta(directory)
            files.check_same_model(meta, contents.parameters, path)
            files.check_same_data(meta, contents.data, path)
            try:
                self._load(directory)
            except CheckpointError as error:
                raise CheckpointError(f"checkpoint {path}: {error}") from error.__cause__
            except (RuntimeError, ValueError, KeyError) as error:
                raise CheckpointError(f"checkpoint {path} does not fit this optimizer or model: {error}") from error
        return contents.plan.resumed(cursor)

    def _load(self, directory: str) -> None:
        contents, states = self._contents, self._contents.states
        state, own = files.read_state(directory), files.read_worker(directory, self._slot) or {}
        left_over = files.read_left_over(directory, self._slot, contents.num_slots)
        optimizer = contents.replica.optimizer
        asked = asked_for(optimizer) if not self._resumed else []
        contents.replica.load(state)
        if not self._scheduled:
            give_back(optimizer)
        if (kept := told_of(asked, optimizer)) is not None:
            self._tell(kept)
        self._resumed = True
        states.load(own.get("codec", {}))
        for other in left_over:
            states.adopt(other["codec"])
        states.weight_per_sample = own.get("weight_per_sample")
        contents.extras.load(state["extras"] | own.get("extras", {}))
